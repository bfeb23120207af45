"""Quality control: measures of a slide, flags, and the pages that show them."""
