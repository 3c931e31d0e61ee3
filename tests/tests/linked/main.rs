//! The engine as a kernel links it, without `std`, with `panic = "abort"` and link-time
//! optimisation: what it needs of others, which panics are left in it, how large it is.
//!
//! The list of panics and the sizes are those of rustc 1.95; with another one they are not held.
//! `BLESS=1 cargo test -p mmu-tests --test linked` writes the sizes in `README.md` anew.

mod archive;
mod panics;

use std::fs;
use std::process::Command;
use std::sync::LazyLock;

use archive::{Linked, root};
use panics::Site;

/// For speed, as the image is built.
static FAST: LazyLock<Linked> = LazyLock::new(|| Linked::build("3"));

/// What a compiler may call without having been asked to; every kernel has them.
const OF_THE_COMPILER: [&str; 5] = ["memcpy", "memmove", "memset", "memcmp", "bcmp"];

#[test]
fn nothing_is_missing_but_the_kernel_and_memcpy() {
    let missing = FAST.missing();
    let unknown: Vec<&&str> = missing
        .iter()
        .filter(|name| !name.starts_with("platform_") && !OF_THE_COMPILER.contains(name))
        .collect();
    assert!(unknown.is_empty(), "the engine needs {unknown:?}");
    assert!(missing.contains("platform_unmap_page"), "the kernel's own functions are missing: {missing:?}");
}

#[test]
fn there_is_no_allocator_and_no_unwinding() {
    let symbols = FAST.symbols.values().map(|symbol| symbol.name.as_str());
    let wrong: Vec<&str> = symbols
        .filter(|name| {
            ["__rust_", "__rg_", "__rdl_", "_Unwind_", "rust_eh_personality"]
                .iter()
                .any(|start| name.contains(start))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn every_panic_that_is_left_is_argued_for() {
    let page = fs::read_to_string(root().join("tests/linked/README.md")).expect("the page");
    let (left, argued) = (panics::left_in(&FAST), panics::argued(&page));
    let certain = ["gather/src/levels/flush_tlb.rs", "tlb/src/cpuset.rs"];
    for file in certain {
        assert!(
            left.iter().any(|site| site.file == file),
            "{file} asserts what no compiler can know: {left:?}"
        );
    }
    let new: Vec<String> = left.difference(&argued).map(Site::item).collect();
    assert!(
        new.is_empty() || !is_compiler_of_the_lists(),
        "these can panic in a kernel: show in tests/linked/README.md why no program reaches them, or remove them\n{}",
        new.join("\n")
    );
    // Another compiler may leave fewer: a panic that is argued for and gone is no error.
    let stale: Vec<&Site> = argued.iter().filter(|site| !panics::is_there(site)).collect();
    assert!(stale.is_empty(), "no such line is in its file any more: {stale:#?}");
}

/// Whether the compiler is the one that the lists were made with. What another one inlines, and
/// which panics it finds impossible, is its own affair.
fn is_compiler_of_the_lists() -> bool {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().map(|output| output.stdout);
    version.is_ok_and(|version| version.starts_with(b"rustc 1.95."))
}

/// What a kernel calls that has munmap, DONTNEED, mprotect and exit, with the switches and the
/// handler.
const USUAL: [&str; 9] = [
    "linked_unmap_region",
    "linked_zap_page_range",
    "linked_gather",
    "linked_change_protection",
    "linked_flush",
    "linked_exit_mmap",
    "linked_switch_mm",
    "linked_enter_lazy_tlb",
    "linked_flush_interrupt",
];

/// The same of a kernel that flushes by means of its own.
const OWN_FLUSH: [&str; 4] =
    ["own_unmap_region", "own_zap_page_range", "own_exit_mmap", "own_change_protection"];

#[test]
fn the_readme_says_how_large_the_text_is() {
    let small = Linked::build("\"s\"");
    let sizes =
        |is_root: fn(&str) -> bool| [&*FAST, &small].map(|linked| in_kib(linked.text_bytes_of(is_root)));
    let rows = [
        ("(c): every call", sizes(|name| name.starts_with("linked_"))),
        ("(c): munmap", sizes(|name| USUAL.contains(&name))),
        ("(b): munmap", sizes(|name| OWN_FLUSH.contains(&name))),
    ];
    println!("KiB of text, opt-level 3 and \"s\": {rows:?}");
    let page = root().join("README.md");
    let text = fs::read_to_string(&page).expect("the page");
    let is_blessed = std::env::var_os("BLESS").is_some();
    let mut nr_rows = 0;
    let right: String = text
        .lines()
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let row = rows.iter().find(|(what, _)| cells.len() == 5 && cells[1].starts_with(what));
            let Some((_, [fast, small])) = row else { return line.to_owned() + "\n" };
            nr_rows += 1;
            for (said, size) in [(cells[2], fast), (cells[3], small)] {
                let is_near = said.parse::<f64>().is_ok_and(|said| (said / size - 1.0).abs() < 0.1);
                assert!(
                    is_near || is_blessed || !is_compiler_of_the_lists(),
                    "it is {size:.1} KiB: BLESS=1 cargo test -p mmu-tests --test linked writes it anew\n{line}"
                );
            }
            format!("| {} | {fast:.1} | {small:.1} |\n", cells[1])
        })
        .collect();
    assert_eq!(nr_rows, rows.len(), "README.md has a row for each: {rows:?}");
    if is_blessed {
        fs::write(&page, right).expect("the page can be written");
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn in_kib(bytes: usize) -> f64 {
    bytes as f64 / 1024.0
}
