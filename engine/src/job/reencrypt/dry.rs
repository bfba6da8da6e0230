//! What it would do, and how long it would take.
