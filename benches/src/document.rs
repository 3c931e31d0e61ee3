//! Figures in a README, written by the command that measures them.
//!
//! A line `<!-- NAME -->` begins what a command writes, and `<!-- end -->` ends it.

use std::path::PathBuf;
use std::{fs, io};

/// A page of this package, or another, that has figures in it.
#[derive(Debug)]
pub struct Page(PathBuf);

impl Page {
    /// The page at `path`, seen from the folder of the benches.
    #[must_use]
    pub fn here(path: &str) -> Self {
        Self(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path))
    }

    /// Puts `text` where the page has figures called `name`.
    ///
    /// # Errors
    /// If the page cannot be read or written, or has no such place.
    pub fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let old = fs::read_to_string(&self.0)?;
        let new = with_figures(&old, name, text).ok_or_else(|| {
            io::Error::other(format!("{}: no <!-- {name} --> and <!-- end --> after it", self.0.display()))
        })?;
        fs::write(&self.0, new)
    }
}

fn with_figures(page: &str, name: &str, text: &str) -> Option<String> {
    let begin = format!("<!-- {name} -->\n");
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once("<!-- end -->")?;
    Some(format!("{before}{begin}{text}<!-- end -->{after}"))
}

#[cfg(test)]
mod tests {
    use super::with_figures;

    #[test]
    fn figures_are_put_where_their_name_is_and_nothing_else_changes() {
        let page = "one\n<!-- a -->\n1\n<!-- end -->\ntwo\n<!-- b -->\n2\n<!-- end -->\nthree\n";
        let expected = "one\n<!-- a -->\n1\n<!-- end -->\ntwo\n<!-- b -->\n3\n4\n<!-- end -->\nthree\n";
        assert_eq!(with_figures(page, "b", "3\n4\n").as_deref(), Some(expected));
        assert_eq!(with_figures(page, "c", ""), None);
    }
}
