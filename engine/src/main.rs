//! cryptd
fn main() {}
