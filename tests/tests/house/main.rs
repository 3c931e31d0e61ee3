//! The house: arrows point down, no file is in a circle, every file can be taken in.

mod imports;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use imports::{Crate, circles};

/// The packages, and those of the workspace that each may depend on (tests and benches of a package
/// left aside).
const BELOW: &[(&str, &[&str])] = &[
    ("pagetable", &[]),
    ("tlb", &[]),
    ("gather", &["pagetable", "tlb"]),
    ("kernel-shim", &["gather"]),
    ("kernel-shim/hosted", &["gather"]),
    ("kernel-shim/adapter", &["gather", "kernel-shim", "kernel-shim/hosted"]),
    ("kernel-shim/boot", &["gather", "kernel-shim"]),
    ("kernel-shim/measured", &["gather"]),
    ("kernel-shim/free-running", &["gather", "kernel-shim"]),
    (
        "kernel-shim/cli",
        &[
            "gather",
            "kernel-shim",
            "kernel-shim/hosted",
            "kernel-shim/adapter",
            "kernel-shim/measured",
            "kernel-shim/free-running",
        ],
    ),
    ("tests", &["gather", "kernel-shim/hosted"]),
    ("tests/linked", &["gather"]),
    ("benches", &["gather", "kernel-shim/measured"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

#[test]
fn no_file_is_in_a_circle_of_imports() {
    let mut wrong = Vec::new();
    for (package, _) in BELOW {
        for name in ["lib.rs", "main.rs"] {
            let file = root().join(package).join("src").join(name);
            if file.exists() {
                let read = Crate::read(&file);
                wrong.extend(
                    circles(&read, &read.uses()).into_iter().map(|said| format!("{package}: {said}")),
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn packages_depend_only_on_those_below_them() {
    let names: BTreeMap<String, &str> = BELOW
        .iter()
        .map(|(package, _)| (section(package, "package")["name"].trim_matches('"').to_owned(), *package))
        .collect();
    for (package, may) in BELOW {
        for name in section(package, "dependencies").keys() {
            let name = name.trim_end_matches(".workspace");
            if let Some(other) = names.get(name) {
                assert!(may.contains(other), "{package} depends on {other}, which is not below it");
            }
        }
    }
}

/// The keys and values of one section of a package's manifest.
fn section(package: &str, name: &str) -> BTreeMap<String, String> {
    let file = root().join(package).join("Cargo.toml");
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    text.lines()
        .skip_while(|line| *line != format!("[{name}]"))
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .collect()
}

#[test]
fn a_file_has_at_most_six_hundred_lines_and_a_folder_twenty_files() {
    let mut wrong = Vec::new();
    for (package, _) in BELOW {
        for folder in folders(&root().join(package), &["src", "tests", "benches"]) {
            let files = rust_files(&folder);
            // Under `tests/` each file is a crate of its own, and its name is what it claims.
            if files.len() > 20 && folder.components().any(|part| part.as_os_str() == "src") {
                wrong.push(format!("{} has {} files", folder.display(), files.len()));
            }
            for file in files {
                let lines = read(&file).lines().count();
                if lines > 600 {
                    wrong.push(format!("{} has {lines} lines", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn comments_are_at_most_a_hundred_columns_wide() {
    let mut wrong = Vec::new();
    for (package, _) in BELOW {
        for folder in folders(&root().join(package), &["src", "tests", "benches"]) {
            for file in rust_files(&folder) {
                for (number, line) in read(&file).lines().enumerate() {
                    if line.trim_start().starts_with("//") && line.chars().count() > 100 {
                        wrong.push(format!("{}:{}", file.display(), number + 1));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} lines:\n{}", wrong.len(), wrong.join("\n"));
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The folders `names` of `package`, and all below them.
fn folders(package: &Path, names: &[&str]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        names.iter().map(|name| package.join(name)).filter(|folder| folder.is_dir()).collect();
    let mut next = 0;
    while let Some(folder) = found.get(next).cloned() {
        found.extend(entries(&folder).into_iter().filter(|path| path.is_dir()));
        next += 1;
    }
    found
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    entries(folder).into_iter().filter(|path| path.extension().is_some_and(|end| end == "rs")).collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let read = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    read.map(|entry| entry.expect("an entry of a folder").path()).collect()
}
