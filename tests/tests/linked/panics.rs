//! The panics that are left in the linked engine, and the page that argues for each.
//!
//! Whoever panics names the place: a `core::panic::Location` in read-only data, which points to the
//! name of the file. A panic that the optimiser has shown to be impossible is gone, and its place
//! with it. So the places that are left are those of the panics that are left.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use object::SectionKind;

use crate::archive::{Linked, root};

/// Where a panic stands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Site {
    /// The file, from the root of the workspace; or the module, in a package from elsewhere.
    pub(crate) file: String,
    /// The line, without what lies around it, and with the next one if it opens a bracket; empty
    /// in the standard library.
    pub(crate) code: String,
}

impl Site {
    /// The item of the page that stands for it.
    pub(crate) fn item(&self) -> String {
        if self.code.is_empty() {
            return format!("- `{}`", self.file);
        }
        format!("- `{}`: `{}`", self.file, self.code)
    }
}

/// The panics that are left.
pub(crate) fn left_in(linked: &Linked) -> BTreeSet<Site> {
    let data = linked.sections.values().filter(|section| section.kind != SectionKind::Text);
    let places = data.flat_map(|section| {
        section.references.iter().filter_map(|reference| {
            // `Location`: the address and length of the name, the line, the column.
            let offset = usize::try_from(reference.offset).ok()?;
            let rest = section.data.get(offset + 8..offset + 24)?;
            let length = u64::from_le_bytes(*rest.first_chunk()?);
            let line = u32::from_le_bytes(*rest[8..].first_chunk()?);
            let name = linked.behind(reference)?.get(..usize::try_from(length).ok()?)?;
            let name = str::from_utf8(name).ok().filter(|name| name.ends_with(".rs"))?;
            Some(site(name, line as usize))
        })
    });
    places.collect()
}

fn site(name: &str, line: usize) -> Site {
    // The standard library's source is installed with some compilers only.
    let is_at_hand = !name.contains("/library/");
    let text = fs::read_to_string(root().join(name)).ok().filter(|_| is_at_hand).unwrap_or_default();
    let code = code_lines(&text).nth(line - 1).unwrap_or_default();
    Site { file: short(name), code }
}

/// The lines as sites have them.
fn code_lines(text: &str) -> impl Iterator<Item = String> + '_ {
    let next = text.lines().map(str::trim).skip(1).chain([""]);
    text.lines()
        .map(str::trim)
        .zip(next)
        .map(|(line, next)| if line.ends_with('(') { format!("{line}{next}") } else { line.to_owned() })
}

/// A file of a package from elsewhere as the path of its module, without version and folder; those
/// of the standard library too (`/rustc/<commit>/library/core/src/..`).
fn short(name: &str) -> String {
    if !Path::new(name).is_absolute() {
        return name.to_owned();
    }
    let (above, inside) = name.rsplit_once("/src/").unwrap_or(("", name));
    let package = above.rsplit('/').next().unwrap_or_default();
    let package = package.rsplit_once('-').map_or(package, |(package, _)| package);
    format!("{package}::{}", inside.trim_end_matches(".rs").replace('/', "::"))
}

/// Whether the line is still in its file; yes, if that is of a package from elsewhere.
pub(crate) fn is_there(site: &Site) -> bool {
    let text = fs::read_to_string(root().join(&site.file));
    site.file.contains("::") || text.is_ok_and(|text| code_lines(&text).any(|line| line == site.code))
}

/// The panics that the page argues for.
pub(crate) fn argued(page: &str) -> BTreeSet<Site> {
    let items = page.lines().filter_map(|line| line.strip_prefix("- `")?.strip_suffix('`'));
    let sites = items.map(|item| match item.split_once("`: `") {
        Some((file, code)) => Site { file: file.to_owned(), code: code.to_owned() },
        None => Site { file: item.to_owned(), code: String::new() },
    });
    sites.collect()
}
