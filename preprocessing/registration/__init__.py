"""Is this the picture of these spots: the agreement of picture and counts, and the verdict."""

from preprocessing.registration.agreement import Agreement
from preprocessing.registration.verdict import (
    UNKNOWN,
    Registration,
    register,
    store_registration,
)

__all__ = ["UNKNOWN", "Agreement", "Registration", "register", "store_registration"]
