//! Making room for a header in front of plain data.
