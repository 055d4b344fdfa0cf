//! vm-run.
fn main() {}
