//! The kernel inside: a user's own, and what ours answers to programs.

use crate::support::{Call, listing, own_root, variable};

#[test]
fn a_kernel_whose_drivers_are_modules_is_refused_by_their_names() {
    let own = own_root();
    let before = listing(own.path());
    let kernel = variable("VM_RUN_TEST_STOCK_KERNEL");
    let kernel = kernel.to_str().expect("text");
    let line = Call::template_build_in(own.path(), &["--name", "stock", "--kernel", kernel]);
    let line = line.refused(125);
    assert!(line.contains("CONFIG_VIRTIO"), "{line}");
    assert_eq!(listing(own.path()), before);
}
