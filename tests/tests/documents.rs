//! What the documents say of the tree: the paths that they name exist, and the rules have their
//! places.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Endings by which a word is known to be a file of this tree, wherever it stands.
const ENDINGS: [&str; 10] =
    [".rs", ".s", ".ld", ".md", ".toml", ".patch", ".sequence", ".layout", ".strace", ".snapshot"];
/// What commands write, or where the reader puts in a name: that need not be there.
const WRITTEN: [&str; 4] = ["target/", "corpus/", "failure.sequence", "NAME"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// All files of the tree, build outputs and the history left aside.
fn files() -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the tree") {
            let path = entry.expect("an entry of a folder").path();
            match path.file_name().and_then(|name| name.to_str()) {
                Some("target" | ".git") => {}
                _ if path.is_dir() => folders.push(path),
                _ => found.push(path),
            }
        }
    }
    found
}

/// The words of a document that may be paths: what stands between spaces, backticks, brackets and
/// bars.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || "`()[]<>|\"';,=".contains(c))
        .map(|word| word.trim_end_matches(['.', ':']))
        .filter(|word| {
            !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "_-./*".contains(c))
        })
}

/// Why `word` of a document in `folder` is a path that does not lead anywhere, if it is one.
fn dead_path(word: &str, folder: &Path, names: &BTreeSet<String>) -> Option<&'static str> {
    let is_file = ENDINGS.iter().any(|ending| word.len() > ending.len() && word.ends_with(ending));
    // An absolute path is of another tree, and `//` of a URL.
    if word.starts_with('/') || word.contains("//") || WRITTEN.iter().any(|part| word.contains(part)) {
        return None;
    }
    let Some((first, _)) = word.split_once('/') else {
        // A bare name: the sentence says where, so one such file anywhere is enough.
        return (is_file && !word.contains('*') && !names.contains(word)).then_some("no file has this name");
    };
    let places = [root(), folder.to_owned(), folder.join("src")];
    // Of a pattern, the folder in front of it.
    let fixed =
        word.split_once('*').map_or(word, |(before, _)| before.rsplit_once('/').map_or("", |(dir, _)| dir));
    let is_ours = is_file || places.iter().any(|place| place.join(first).is_dir());
    (is_ours && !places.iter().any(|place| place.join(fixed).exists())).then_some("no such path")
}

#[test]
fn every_path_that_a_document_names_exists() {
    let files = files();
    let names: BTreeSet<String> =
        files.iter().filter_map(|file| Some(file.file_name()?.to_str()?.to_owned())).collect();
    let mut dead = Vec::new();
    let mut nr_documents = 0;
    for file in files.iter().filter(|file| file.extension().is_some_and(|ending| ending == "md")) {
        nr_documents += 1;
        let folder = file.parent().expect("a file is in a folder");
        for (number, line) in read(file).lines().enumerate() {
            for word in words(line) {
                if let Some(why) = dead_path(word, folder, &names) {
                    dead.push(format!("{}:{}: {word}: {why}", file.display(), number + 1));
                }
            }
        }
    }
    assert!(nr_documents >= 10, "only {nr_documents} documents were found");
    assert!(dead.is_empty(), "{}", dead.join("\n"));
}

/// The rules: the package whose documentation has the sentences, the letter, and how many there
/// are.
const RULES: [(&str, char, u32); 3] = [("pagetable", 'P', 4), ("tlb", 'T', 6), ("gather", 'G', 7)];

#[test]
fn each_rule_has_its_sentence_its_test_and_its_row() {
    let index = read(&root().join("CONTRIBUTING.md"));
    for (package, letter, count) in RULES {
        let sentences = read(&root().join(package).join("src/lib.rs"));
        let tests = read(&root().join(format!("tests/tests/rules_{package}.rs")));
        let numbers = |text: &str, before: &str, after: &str| -> BTreeSet<u32> {
            let starts = text.lines().filter_map(|line| line.strip_prefix(before)?.split_once(after));
            starts.filter_map(|(number, _)| number.parse().ok()).collect()
        };
        let all: BTreeSet<u32> = (1..=count).collect();
        assert_eq!(numbers(&sentences, &format!("//! - **{letter}"), "**"), all, "sentences in {package}");
        assert_eq!(
            numbers(&tests, &format!("fn {}", letter.to_ascii_lowercase()), "_"),
            all,
            "tests of {package}"
        );
        assert_eq!(
            numbers(&index, &format!("| {letter}"), " |"),
            all,
            "rows of {package} in CONTRIBUTING.md"
        );
    }
}

/// The rules of `text`, whose lines begin with `prefix`: each with its sentence in one line,
/// without the brackets of links.
fn sentences(text: &str, prefix: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut inside = false;
    for line in text.lines().map(|line| line.strip_prefix(prefix).unwrap_or("")) {
        if let Some(rule) = line.strip_prefix("- **") {
            found.push(format!("**{rule}"));
            inside = true;
        } else if let (true, Some(more), Some(rule)) = (inside, line.strip_prefix("  "), found.last_mut()) {
            rule.push(' ');
            rule.push_str(more.trim());
        } else {
            inside = false;
        }
    }
    found.iter().map(|rule| rule.replace("[`", "`").replace("`]", "`")).collect()
}

#[test]
fn the_readme_of_a_published_package_has_its_rules_and_the_rust_it_needs() {
    for (package, letter, count) in RULES {
        let folder = root().join(package);
        let (readme, manifest) = (read(&folder.join("README.md")), read(&folder.join("Cargo.toml")));
        let mut rules = sentences(&read(&folder.join("src/lib.rs")), "//! ");
        let heads: Vec<String> = (1..=count).map(|number| format!("**{letter}{number}** ")).collect();
        rules.retain(|rule| heads.iter().any(|head| rule.starts_with(head)));
        assert_eq!(rules.len(), count as usize, "rules of {package}");
        assert_eq!(sentences(&readme, ""), rules, "{package}/README.md");

        let rust = manifest.lines().find_map(|line| line.strip_prefix("rust-version = "));
        let needs = format!("Rust {} or newer", rust.expect("a version of its own").trim_matches('"'));
        assert!(readme.contains(&needs), "{package}/README.md does not say: {needs}");
    }
}

#[test]
fn the_page_on_security_names_all_that_is_unsafe_to_implement_or_to_call() {
    let page = read(&root().join("SECURITY.md"));
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let named: BTreeSet<&str> = page.split(|c| !is_word(c)).collect();
    let mut found = 0;
    let mut missing = Vec::new();
    for file in files() {
        let is_engine = RULES.iter().any(|(package, ..)| file.starts_with(root().join(package).join("src")));
        if !is_engine {
            continue;
        }
        for line in read(&file).lines().map(str::trim_start) {
            let heads = ["pub unsafe trait ", "pub unsafe fn ", "pub const unsafe fn "];
            let Some(rest) = heads.iter().find_map(|head| line.strip_prefix(head)) else { continue };
            let name = rest.split(|c| !is_word(c)).next().expect("a name follows");
            found += 1;
            if !named.contains(name) {
                missing.push(format!("{name} of {}", file.display()));
            }
        }
    }
    assert!(found >= 40, "only {found} were found");
    assert!(missing.is_empty(), "SECURITY.md does not name {}", missing.join(", "));
}

/// The code spans of `text` that name an item of ours: `Type`, `function_of_ours`, `Type::item`.
fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(|span| {
        let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
        let is_ours =
            span.contains("::") || span.contains('_') || span.starts_with(|c: char| c.is_uppercase());
        is_ours && span.split("::").all(is_name) && *span != "Display"
    })
}

#[test]
fn every_item_that_the_page_for_contributors_names_is_defined_somewhere() {
    let sources: Vec<String> = files()
        .iter()
        .filter(|file| file.extension().is_some_and(|end| end == "rs"))
        .map(|file| read(file))
        .collect();
    let page = read(&root().join("CONTRIBUTING.md"));
    let is_defined = |name: &str| {
        ["fn ", "const ", "struct ", "enum ", "trait "].iter().any(|keyword| {
            let definition = format!("{keyword}{name}");
            let ends = |text: &str| !text.starts_with(|c: char| c.is_alphanumeric() || c == '_');
            sources.iter().any(|text| {
                text.match_indices(&definition).any(|(at, found)| ends(&text[at + found.len()..]))
            })
        })
    };
    let named: BTreeSet<&str> = items(&page).flat_map(|span| span.split("::")).collect();
    assert!(named.len() >= 10, "only {named:?} are named");
    let gone: Vec<&str> = named.into_iter().filter(|name| !is_defined(name)).collect();
    assert!(gone.is_empty(), "named in CONTRIBUTING.md and defined nowhere: {gone:?}");
}
