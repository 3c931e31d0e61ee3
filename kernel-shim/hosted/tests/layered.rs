//! The kit on a kernel that is generic over its hardware.

#[path = "../examples/layered/hardware.rs"]
mod hardware;
#[path = "../examples/layered/hosted.rs"]
mod hosted;
#[path = "../examples/layered/kernel.rs"]
mod kernel;
#[path = "../examples/layered/kit.rs"]
mod kit;
#[path = "../../tests/lines/mod.rs"]
mod lines;

use std::sync::Arc;

use mmu_hosted::{FuzzOptions, fuzz};

#[test]
fn a_kernel_that_is_generic_over_its_hardware_is_clean_on_the_hosted_machine() {
    let report = fuzz(&FuzzOptions::default(), |machine| Ok(kernel::Kernel::new(Arc::clone(machine))))
        .expect("memory");
    assert!(report.is_clean() && report.calls.of("unmap").done > 1000, "{report}");
}

#[test]
fn the_guide_says_how_many_lines_the_layer_is() {
    let guide = include_str!("../README.md");
    let hardware = include_str!("../examples/layered/hardware.rs");
    let (declared, bare_metal) = hardware.split_once("impl Hardware for BareMetal").expect("it is there");
    let declared = declared.split_once("pub(crate) trait Hardware").expect("it is there").1;
    for (what, text) in [
        ("the trait", declared),
        ("bare metal", bare_metal),
        ("hosted.rs", include_str!("../examples/layered/hosted.rs")),
        ("kit.rs", include_str!("../examples/layered/kit.rs")),
    ] {
        let nr_lines = lines::code_lines(text).count();
        assert!(guide.contains(&format!("{what}: {nr_lines} lines")), "{what}: {nr_lines} lines");
    }
}
