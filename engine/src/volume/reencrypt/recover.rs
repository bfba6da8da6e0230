//! An interrupted step made whole; the table of what is done when.
