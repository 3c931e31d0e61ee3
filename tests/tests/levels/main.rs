//! The three levels at which a kernel may take the engine: each example runs, is short enough, and
//! implements the traits that the README counts.
//!
//! `BLESS=1 cargo test -p mmu-tests --test levels` writes the figures of the README anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lines::code_lines;
use syn::{Item, TraitItem};

#[path = "../../../kernel-shim/tests/lines/mod.rs"]
mod lines;

#[expect(unsafe_code, reason = "a flush and cleared entries are taken on trust")]
#[path = "../../../gather/examples/level_a.rs"]
mod level_a;

#[expect(unsafe_code, reason = "page tables, and a flush taken on trust")]
#[path = "../../../gather/examples/level_b.rs"]
mod level_b;

#[expect(unsafe_code, reason = "page tables and CPUs")]
mod level_c {
    include!("../../../gather/examples/small_kernel/machine.rs");
    include!("../../../gather/examples/small_kernel/calls.rs");
}

/// One level.
struct Level {
    /// Its example: a file, or a folder.
    example: &'static str,
    /// The traits that a kernel implements.
    traits: &'static [&'static str],
    most_lines: usize,
    most_methods: usize,
}

const LEVELS: [Level; 3] = [
    Level {
        example: "gather/examples/level_a.rs",
        traits: &["FlushTlb", "Release"],
        most_lines: 60,
        most_methods: 6,
    },
    Level {
        example: "gather/examples/level_b.rs",
        traits: &["PageTableFrameMapping", "TableMemory", "FlushTlb", "Pages"],
        most_lines: 120,
        most_methods: 6,
    },
    Level {
        example: "gather/examples/small_kernel",
        traits: &["PageTableFrameMapping", "TableMemory", "Cpus", "Pages"],
        most_lines: 200,
        most_methods: 8,
    },
];

/// Where the engine defines each trait.
const DEFINED_IN: [(&str, &str); 5] = [
    ("TableMemory", "pagetable/src/memory.rs"),
    ("Cpus", "tlb/src/mmu.rs"),
    ("Pages", "gather/src/platform.rs"),
    ("FlushTlb", "gather/src/levels/flush_tlb.rs"),
    ("Release", "gather/src/queue/release.rs"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

impl Level {
    fn files(&self) -> Vec<PathBuf> {
        let path = root().join(self.example);
        if path.is_file() {
            return vec![path];
        }
        fs::read_dir(path).expect("the folder").map(|entry| entry.expect("an entry").path()).collect()
    }

    fn nr_lines(&self) -> usize {
        self.files().iter().map(|file| code_lines(&read(file)).count()).sum()
    }

    fn nr_methods(&self) -> usize {
        self.traits.iter().map(|name| required_methods(name).len()).sum()
    }
}

/// The methods of a trait without a default.
fn required_methods(name: &str) -> Vec<String> {
    if name == "PageTableFrameMapping" {
        // Of the `x86_64` crate.
        return vec!["frame_to_pointer".to_owned()];
    }
    let (_, file) = DEFINED_IN.iter().find(|(defined, _)| *defined == name).expect("a trait of the engine");
    let items = syn::parse_file(&read(&root().join(file))).expect("Rust").items;
    let defined = items
        .into_iter()
        .find_map(|item| match item {
            Item::Trait(defined) if defined.ident == name => Some(defined),
            _ => None,
        })
        .unwrap_or_else(|| panic!("{file} defines {name}"));
    let required = defined.items.into_iter().filter_map(|item| match item {
        TraitItem::Fn(method) if method.default.is_none() => Some(method.sig.ident.to_string()),
        _ => None,
    });
    required.collect()
}

/// The traits of the engine, or for it, that the files implement.
fn implemented(files: &[PathBuf]) -> Vec<String> {
    let mut found: Vec<String> = files
        .iter()
        .flat_map(|file| syn::parse_file(&read(file)).expect("Rust").items)
        .filter_map(|item| match item {
            Item::Impl(item) => item.trait_.map(|(_, path, _)| path),
            _ => None,
        })
        .filter_map(|path| path.segments.last().map(|segment| segment.ident.to_string()))
        .filter(|name| {
            name == "PageTableFrameMapping" || DEFINED_IN.iter().any(|(defined, _)| name == defined)
        })
        .collect();
    found.sort();
    found
}

#[test]
fn a_kernel_with_its_own_walk_and_flush_needs_the_gather_alone() {
    level_a::main();
}

#[test]
fn a_kernel_with_its_own_flush_never_calls_switch_mm() {
    level_b::main();
    let text = read(&root().join(LEVELS[1].example));
    assert!(!text.contains("switch_mm") && !text.contains("CpuTlb"));
}

#[test]
fn a_kernel_that_takes_all_of_the_engine_sends_one_interrupt() {
    level_c::main();
    let text = read(&root().join(LEVELS[2].example).join("machine.rs"));
    assert!(text.contains("fn send_flush_interrupt") && !text.contains("fn flush_others"));
}

#[test]
fn each_level_is_short_and_implements_what_the_readme_counts() {
    for level in &LEVELS {
        let Level { example, most_lines, most_methods, .. } = *level;
        let files = level.files();
        let formatted = Command::new("rustfmt").args(["--edition", "2024", "--check"]).args(&files).output();
        // A toolchain of the minimal profile has no rustfmt.
        if let Ok(formatted) = formatted {
            assert!(formatted.status.success(), "{}", String::from_utf8_lossy(&formatted.stdout));
        }
        assert!(level.nr_lines() <= most_lines, "{example} has {} lines of {most_lines}", level.nr_lines());
        assert!(level.nr_methods() <= most_methods, "{example} needs {} methods", level.nr_methods());
        let mut traits: Vec<String> = level.traits.iter().map(ToString::to_string).collect();
        traits.sort();
        assert_eq!(implemented(&files), traits, "{example}");
    }
}

/// The row of `level`, with the figures as they should be, if this is one.
fn corrected(line: &str) -> Option<String> {
    let cells: Vec<&str> = line.split('|').collect();
    let [before, name, _, _, example, _, after] = cells[..] else { return None };
    let level = LEVELS.iter().find(|level| example.trim().trim_matches('`') == level.example)?;
    let traits: Vec<String> = level.traits.iter().map(|name| format!("`{name}`")).collect();
    let (traits, methods, lines) = (traits.join(", "), level.nr_methods(), level.nr_lines());
    Some(
        [
            before,
            name,
            &format!(" {traits} "),
            &format!(" {methods} "),
            example,
            &format!(" {lines} "),
            after,
        ]
        .join("|"),
    )
}

#[test]
fn the_figures_of_the_readme_are_those_of_the_levels() {
    let page = root().join("README.md");
    let text = read(&page);
    let mut nr_rows = 0;
    let right: String = text
        .lines()
        .map(|line| {
            let new = corrected(line);
            nr_rows += usize::from(new.is_some());
            new.unwrap_or_else(|| line.to_owned()) + "\n"
        })
        .collect();
    assert_eq!(nr_rows, LEVELS.len(), "a row for each level");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&page, right).expect("the page can be written");
        return;
    }
    for (stands, should) in text.lines().zip(right.lines()) {
        assert_eq!(stands, should, "BLESS=1 cargo test -p mmu-tests --test levels writes it anew");
    }
}
