//! Files that a command writes: there as a whole or not at all, and known to be writable before the
//! work begins.
//!
//! A file that is cut short could be taken for a whole one. A device or a pipe is written into and
//! stays what it is, and a link to a file stays a link.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::output::cleanup::UnfinishedFile;

/// A place that can be written to.
#[derive(Debug)]
pub(crate) struct OutputFile {
    file: File,
    becomes: Option<(UnfinishedFile, PathBuf)>,
}

impl OutputFile {
    /// Makes sure that `path` can be written. What is there stays until [`write`](Self::write) is
    /// called.
    ///
    /// # Errors
    /// What the host says.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let there = fs::metadata(path).ok();
        // Under such a name a file may be open already, such as the standard output. It must not be
        // replaced: whoever opened it would not see the new one.
        let is_open_elsewhere = ["/dev", "/proc"].iter().any(|root| path.starts_with(root));
        if there.as_ref().is_some_and(|there| is_open_elsewhere || !there.is_file()) {
            let file = OpenOptions::new().write(true).open(path)?;
            return Ok(Self { file, becomes: None });
        }
        let whole = match &there {
            Some(_) => fs::canonicalize(path)?,
            None => behind_link(path),
        };
        let mut temporary = whole.clone().into_os_string();
        temporary.push(format!(".{}.part", std::process::id()));
        let temporary = UnfinishedFile::new(Path::new(&temporary));
        let file = File::create(temporary.path())?;
        if let Some(there) = there {
            file.set_permissions(there.permissions())?;
        }
        Ok(Self { file, becomes: Some((temporary, whole)) })
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// What `content` or the host says; what was there before is still there then, if it was a
    /// file.
    pub(crate) fn write(
        self,
        content: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut out = BufWriter::new(&self.file);
        content(&mut out)?;
        out.flush()?;
        match &self.becomes {
            Some((temporary, path)) => fs::rename(temporary.path(), path),
            None => Ok(()),
        }
    }
}

/// The target of a link, where the target does not exist yet, or else the path itself.
fn behind_link(path: &Path) -> PathBuf {
    let target = fs::read_link(path).map(|target| path.parent().unwrap_or(Path::new("")).join(target));
    target.unwrap_or_else(|_| path.to_owned())
}
