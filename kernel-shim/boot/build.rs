//! Hands the linker what a bootable image needs, when the image is what is being built.
//!
//! In an ordinary build `MMU_BOOT_IMAGE` is unset: the library is type-checked and unit-tested on
//! the host, the binary is a host program that only says how to build the image. `image.toml` sets
//! the variable, and `cfg(bare)` follows from it.

use std::env;

/// Arguments for the C compiler that drives the link, after those of rustc.
const LINK_ARGS: [&str; 7] = [
    "-nostartfiles",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,--no-eh-frame-hdr",
    // Segments are mapped page by page with their own rights; nothing else needs padding to 2 MiB.
    "-Wl,-z,max-page-size=4096",
];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(bare)");
    println!("cargo::rerun-if-env-changed=MMU_BOOT_IMAGE");
    println!("cargo::rerun-if-changed=image.ld");
    if env::var_os("MMU_BOOT_IMAGE").is_none() {
        return;
    }
    println!("cargo::rustc-cfg=bare");
    for argument in LINK_ARGS {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    let directory = env::var("CARGO_MANIFEST_DIR").expect("cargo always sets the manifest directory");
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{directory}/image.ld");
}
