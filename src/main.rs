//! The `memdev` command.
fn main() {}
