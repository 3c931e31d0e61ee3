//! Builds `tests/linked` as a static library, and takes out of it the one object that is ours.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::read::archive::ArchiveFile;
use object::{
    File, Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionIndex, SectionKind, SymbolIndex,
};

/// Something in a section that names a place in another, or a symbol that is in none.
pub(crate) struct Reference {
    /// Where it stands in its section.
    pub(crate) offset: u64,
    /// The symbol that it names.
    pub(crate) symbol: SymbolIndex,
    pub(crate) addend: i64,
}

pub(crate) struct Section {
    pub(crate) kind: SectionKind,
    pub(crate) data: Vec<u8>,
    pub(crate) references: Vec<Reference>,
}

pub(crate) struct Symbol {
    pub(crate) name: String,
    pub(crate) section: Option<SectionIndex>,
    pub(crate) address: u64,
    /// Somebody else has to define it.
    pub(crate) is_missing: bool,
}

/// The engine, linked: sections and symbols of the object that link-time optimisation made.
pub(crate) struct Linked {
    pub(crate) sections: HashMap<SectionIndex, Section>,
    pub(crate) symbols: HashMap<SymbolIndex, Symbol>,
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

impl Linked {
    /// Builds the library with `opt_level`, if it is not up to date, and reads it.
    pub(crate) fn build(opt_level: &str) -> Self {
        // A folder for each: cargo would put the next library in the place of the last.
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("linked-{}", opt_level.trim_matches('"')));
        let output = Command::new(env!("CARGO"))
            .args(["rustc", "--offline", "--quiet", "-p", "mmu-linked", "--crate-type", "staticlib"])
            .args(["--config", "tests/linked/linked.toml", "--profile", "linked"])
            .arg("--config")
            .arg(format!("profile.linked.opt-level={opt_level}"))
            .arg("--target-dir")
            .arg(&folder)
            .current_dir(root())
            // Of whoever runs the tests; they would change what is measured.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let library = folder.join("x86_64-unknown-linux-gnu/linked/libmmu_linked.a");
        Self::read(&fs::read(&library).unwrap_or_else(|error| panic!("{}: {error}", library.display())))
    }

    fn read(library: &[u8]) -> Self {
        let archive = ArchiveFile::parse(library).expect("an archive");
        let members = archive.members().map(|member| member.expect("a member"));
        // Beside it rustc puts what compilers call: divisions of 128 bits, and the like.
        let ours = members.filter(|member| member.name().starts_with(b"mmu_linked"));
        let objects: Vec<&[u8]> = ours.map(|member| member.data(library).expect("its bytes")).collect();
        let [object] = objects[..] else { panic!("{} objects, where LTO makes one", objects.len()) };
        let file = File::parse(object).expect("an object");
        let sections = file.sections().map(|section| (section.index(), read_section(&section))).collect();
        let symbols = file.symbols().map(|symbol| (symbol.index(), read_symbol(&symbol))).collect();
        Self { sections, symbols }
    }

    /// The symbols that somebody else has to define.
    pub(crate) fn missing(&self) -> BTreeSet<&str> {
        let symbols = self.symbols.values().filter(|symbol| symbol.is_missing);
        symbols.map(|symbol| symbol.name.as_str()).filter(|name| !name.is_empty()).collect()
    }

    /// The bytes of the functions that `is_root` picks by name, and of all that they lead to.
    pub(crate) fn text_bytes_of(&self, is_root: impl Fn(&str) -> bool) -> usize {
        let mut reached = HashSet::new();
        let roots = self.symbols.values().filter(|symbol| is_root(&symbol.name));
        let mut next: Vec<SectionIndex> = roots.filter_map(|symbol| symbol.section).collect();
        assert!(!next.is_empty(), "no function has such a name");
        while let Some(index) = next.pop() {
            if reached.insert(index) {
                let references = &self.sections[&index].references;
                next.extend(
                    references.iter().filter_map(|reference| self.symbols[&reference.symbol].section),
                );
            }
        }
        let sections = reached.iter().map(|index| &self.sections[index]);
        sections.filter(|section| section.kind == SectionKind::Text).map(|section| section.data.len()).sum()
    }

    /// The bytes that a reference leads to, to the end of their section.
    pub(crate) fn behind(&self, reference: &Reference) -> Option<&[u8]> {
        let symbol = &self.symbols[&reference.symbol];
        let start = symbol.address.checked_add_signed(reference.addend)?;
        self.sections[&symbol.section?].data.get(usize::try_from(start).ok()?..)
    }
}

fn read_section<'d>(section: &impl ObjectSection<'d>) -> Section {
    let references = section.relocations().filter_map(|(offset, relocation)| match relocation.target() {
        RelocationTarget::Symbol(symbol) => Some(Reference { offset, symbol, addend: relocation.addend() }),
        _ => None,
    });
    Section {
        kind: section.kind(),
        data: section.data().expect("bytes of a section").to_vec(),
        references: references.collect(),
    }
}

fn read_symbol<'d>(symbol: &impl ObjectSymbol<'d>) -> Symbol {
    Symbol {
        name: symbol.name().expect("a name in UTF-8").to_owned(),
        section: symbol.section_index(),
        address: symbol.address(),
        is_missing: symbol.is_undefined(),
    }
}
