"""Values of an HDF5 file that lie in other files: links, external and virtual datasets.

A file from somebody else could read any file of this machine with them; HiBio writes none.
"""

import h5py


def outside_data(file: h5py.File) -> str | None:
    """Find the first name that is a link, or whose values are in another file.

    Args:
        file: open for reading.

    Returns:
        What was found, for a message; None when everything is inside. Groups that contain
        themselves are looked into once.
    """
    pending, seen = [file["/"]], set()
    while pending:
        group = pending.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            continue
        seen.add(address)
        for name in group:
            place = f"{group.name.rstrip('/')}/{name}"
            if type(group.get(name, getlink=True)) is not h5py.HardLink:
                return f"{place} is a link"
            item = group[name]
            if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                return f"{place} has its values in another file"
            if isinstance(item, h5py.Group):
                pending.append(item)
    return None
