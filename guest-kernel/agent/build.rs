//! The program `warm` runs in any image, so it has no C library: neither the one
//! of the image, nor one of its own.

fn main() {
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo::rustc-link-arg-bin=warm={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
