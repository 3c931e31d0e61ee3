//! The image itself: the library, linked to be booted.
//!
//! Built without `image.toml` this is a host program that only says how the image is built.
#![cfg_attr(bare, no_std, no_main)]

// The entry point is in the library, and the linker script names it.
#[cfg(bare)]
use mmu_boot as _;

#[cfg(not(bare))]
fn main() -> std::process::ExitCode {
    eprintln!(
        "mmu-boot is an image to be booted, not a host program; build it with\n\
         cargo build --config kernel-shim/boot/image.toml --profile image -p mmu-boot"
    );
    std::process::ExitCode::from(2)
}
