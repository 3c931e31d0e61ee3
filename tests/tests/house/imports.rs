//! Which file of a package uses which: `use` declarations, paths in code, and paths in the
//! arguments of macros.
//!
//! In: the root file of a crate. Out: its files, and for each the files that define what it names.
//! A name that a file re-exports leads to the file that defines it. Not counted: `mod`
//! declarations, what a file re-exports from the files below it, code under `#[cfg(test)]`,
//! comments. Names that macros make up and methods of traits are not seen.

use core::fmt::Write as _;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Ident, Item, ItemUse, UseTree, Visibility};

/// The place of a module in its crate: `["zap", "tests"]`; the root is empty.
type Place = Vec<String>;

/// One module: its file, what it defines, and what it brings into scope.
#[derive(Default)]
struct Module {
    file: PathBuf,
    defines: BTreeSet<String>,
    /// Name in this module, and the path behind it.
    brings: BTreeMap<String, Vec<String>>,
    /// Paths whose every name is brought in.
    globs: Vec<Vec<String>>,
    /// Paths that count as used here, each as it is written.
    names: BTreeSet<Vec<String>>,
}

/// The modules of one crate.
pub(crate) struct Crate {
    modules: BTreeMap<Place, Module>,
    root: PathBuf,
}

/// Which file uses which, and by what name.
pub(crate) type Uses = BTreeMap<PathBuf, BTreeMap<PathBuf, String>>;

impl Crate {
    /// Reads the crate whose root is the file `root`.
    pub(crate) fn read(root: &Path) -> Self {
        let mut this = Self { modules: BTreeMap::new(), root: root.to_owned() };
        let folder = root.parent().expect("a file has a folder");
        this.add_file(root, folder, Vec::new());
        this
    }

    fn add_file(&mut self, file: &Path, folder: &Path, place: Place) {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.add_items(&parsed.items, file, folder, place);
    }

    fn add_items(&mut self, items: &[Item], file: &Path, folder: &Path, place: Place) {
        let mut module = Module { file: file.to_owned(), ..Module::default() };
        for item in items.iter().filter(|item| !is_for_tests(attributes(item))) {
            if let Some(name) = defined(item) {
                module.defines.insert(name.to_string());
            }
            match item {
                Item::Use(declaration) => module.bring(declaration),
                Item::Mod(child) => {
                    let name = child.ident.to_string();
                    let place = [place.clone(), vec![name.clone()]].concat();
                    let below = folder.join(&name);
                    match &child.content {
                        Some((_, items)) => self.add_items(items, file, &below, place),
                        None if below.with_extension("rs").exists() => {
                            self.add_file(&below.with_extension("rs"), &below, place);
                        }
                        None => self.add_file(&below.join("mod.rs"), &below, place),
                    }
                }
                _ => module.visit_item(item),
            }
        }
        self.modules.insert(place, module);
    }

    /// Which file uses which.
    pub(crate) fn uses(&self) -> Uses {
        let mut uses = Uses::new();
        for (place, module) in &self.modules {
            let from = uses.entry(module.file.clone()).or_default();
            for name in &module.names {
                let Some(target) = self.defining(place, name, 8) else { continue };
                if *target != module.file {
                    from.entry(target.clone()).or_insert_with(|| name.join("::"));
                }
            }
        }
        uses
    }

    /// The file that defines what `name` means in the module at `place`, if it is one of this
    /// crate.
    fn defining(&self, place: &Place, name: &[String], depth: usize) -> Option<&PathBuf> {
        let module = self.modules.get(place)?;
        let (first, rest) = name.split_first()?;
        if depth == 0 {
            return None;
        }
        let mut inside = match first.as_str() {
            "crate" => Vec::new(),
            "self" => place.clone(),
            "super" => place.split_last()?.1.to_vec(),
            _ => {
                let child = [place.clone(), vec![first.clone()]].concat();
                if self.modules.contains_key(&child) {
                    child
                } else if module.defines.contains(first) {
                    return Some(&module.file);
                } else {
                    return self.brought(place, name, depth);
                }
            }
        };
        let mut rest = rest;
        while let Some((next, after)) = rest.split_first() {
            if next == "super" {
                inside.pop()?;
            } else if next != "self" {
                let child = [inside.clone(), vec![next.clone()]].concat();
                if !self.modules.contains_key(&child) {
                    // An item: what comes after it (a variant, a method) is of the same file.
                    return self.defining(&inside, rest, depth - 1);
                }
                inside = child;
            }
            rest = after;
        }
        self.modules.get(&inside).map(|module| &module.file)
    }

    /// As [`defining`](Self::defining), for a name that the module at `place` has from elsewhere.
    fn brought(&self, place: &Place, name: &[String], depth: usize) -> Option<&PathBuf> {
        let module = self.modules.get(place)?;
        let (first, rest) = name.split_first()?;
        match module.brings.get(first) {
            // `use alloc::alloc;` would lead to itself.
            Some(path) if path.first() == Some(first) => None,
            Some(path) => self.defining(place, &[path, rest].concat(), depth - 1),
            None => {
                module.globs.iter().find_map(|path| self.defining(place, &[path, name].concat(), depth - 1))
            }
        }
    }

    /// The path of `file` below the folder of the root.
    pub(crate) fn short(&self, file: &Path) -> String {
        let folder = self.root.parent().expect("a file has a folder");
        file.strip_prefix(folder).unwrap_or(file).display().to_string()
    }
}

impl Module {
    fn bring(&mut self, declaration: &ItemUse) {
        let passed_on = !matches!(declaration.vis, Visibility::Inherited);
        let mut path = Vec::new();
        self.bring_tree(&declaration.tree, &mut path, passed_on);
    }

    fn bring_tree(&mut self, tree: &UseTree, path: &mut Vec<String>, passed_on: bool) {
        let ends = |module: &mut Self, name: String, path: Vec<String>| {
            // What a module passes on from below it, it does not use.
            let up = matches!(path[0].as_str(), "crate" | "super");
            if !passed_on || up {
                module.names.insert(path.clone());
            }
            module.brings.insert(name, path);
        };
        match tree {
            UseTree::Path(step) => {
                path.push(step.ident.to_string());
                self.bring_tree(&step.tree, path, passed_on);
                path.pop();
            }
            UseTree::Name(name) if name.ident == "self" => {
                ends(self, path.last().cloned().unwrap_or_default(), path.clone());
            }
            UseTree::Name(name) => {
                let name = name.ident.to_string();
                ends(self, name.clone(), [path.clone(), vec![name]].concat());
            }
            UseTree::Rename(rename) => {
                let end = [path.clone(), vec![rename.ident.to_string()]].concat();
                ends(self, rename.rename.to_string(), end);
            }
            UseTree::Glob(_) => {
                if !passed_on {
                    self.names.insert(path.clone());
                }
                self.globs.push(path.clone());
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.bring_tree(tree, path, passed_on);
                }
            }
        }
    }

    /// Notes the paths of two names or more among the arguments of a macro.
    fn note_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.note(core::mem::take(&mut path));
                    }
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Group(group) => {
                    self.note(core::mem::take(&mut path));
                    self.note_tokens(group.stream());
                    colons = 0;
                }
                _ => {
                    self.note(core::mem::take(&mut path));
                    colons = 0;
                }
            }
        }
        self.note(path);
    }

    fn note(&mut self, path: Vec<String>) {
        if path.len() > 1 {
            self.names.insert(path);
        }
    }
}

impl<'ast> Visit<'ast> for Module {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.note(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.note_tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    fn visit_item_use(&mut self, declaration: &'ast ItemUse) {
        self.bring(declaration);
    }
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether only tests see it: `#[cfg(test)]`, alone or with more that must hold as well.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else { return false };
        let condition = list.tokens.to_string();
        attribute.path().is_ident("cfg") && (condition == "test" || condition.starts_with("all (test"))
    })
}

fn defined(item: &Item) -> Option<&Ident> {
    Some(match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    })
}

/// The circles among `uses`: each a set of files that all lead to each other, with the arrows
/// between them in words.
pub(crate) fn circles(of: &Crate, uses: &Uses) -> Vec<String> {
    let reach: BTreeMap<&PathBuf, BTreeSet<&PathBuf>> =
        uses.keys().map(|file| (file, reached_from(file, uses))).collect();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for file in uses.keys().filter(|file| reach[file].contains(file)) {
        let circle: BTreeSet<&PathBuf> =
            reach[file].iter().copied().filter(|other| reach[other].contains(file)).collect();
        if !seen.insert(file) || circle.iter().any(|other| *other < file) {
            continue;
        }
        let mut said = format!("a circle of {} files", circle.len());
        for from in &circle {
            for (to, name) in uses[*from].iter().filter(|(to, _)| circle.contains(to)) {
                let _ = write!(said, "\n    {} -> {} ({name})", of.short(from), of.short(to));
            }
        }
        found.push(said);
    }
    found
}

fn reached_from<'u>(file: &Path, uses: &'u Uses) -> BTreeSet<&'u PathBuf> {
    let mut reached = BTreeSet::new();
    let mut open = vec![file.to_path_buf()];
    while let Some(next) = open.pop() {
        for to in uses.get(&next).into_iter().flat_map(BTreeMap::keys) {
            if reached.insert(to) {
                open.push(to.clone());
            }
        }
    }
    reached
}
