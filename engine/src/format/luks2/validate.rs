//! The rules over a header as a whole, as cryptsetup's own validation has them.
