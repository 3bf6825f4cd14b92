//! A lean NBD load generator.
fn main() {}
