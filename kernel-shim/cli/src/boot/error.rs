//! Why nothing was booted, or why a run says nothing about the engine.

use std::io;
use std::path::PathBuf;

/// Why nothing was booted, or why a run says nothing about the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// QEMU was not found.
    #[error(
        "cannot find {}: install QEMU (Debian, Ubuntu: apt-get install --no-install-recommends qemu-system-x86; \
         Fedora: dnf install qemu-system-x86-core), or name it with --qemu PATH",
        .0.display()
    )]
    NoQemu(PathBuf),
    /// QEMU refused to run.
    #[error("QEMU: {0}")]
    Qemu(String),
    /// The source tree that the image is built from is gone.
    #[error(
        "the sources this command was built from are not at {}: build the image as kernel-shim/boot/README.md says, \
         and name it with --image PATH",
        .0.display()
    )]
    NoSources(PathBuf),
    /// The image could not be built.
    #[error("cannot build the image: {0}")]
    Cargo(String),
    /// The path of --image is not a file.
    #[error("{}: expected an image file; kernel-shim/boot/README.md says how to build one", .0.display())]
    NoImage(PathBuf),
    /// QEMU was killed at the time limit, before the run had a verdict.
    #[error("QEMU did not end within {seconds} s (--timeout); {last}")]
    TimedOut {
        /// The limit.
        seconds: u64,
        /// What the image printed last, in words.
        last: String,
    },
    /// The run ended as if all were well, but the image did not do or print all that was asked for.
    #[error("{0}, so this run says nothing about the engine")]
    Incomplete(String),
    /// The image refused what the command line asks for.
    #[error("the image: {0}")]
    Image(String),
    /// The options do not go together.
    #[error("{0}")]
    Usage(&'static str),
    /// A file could not be read or written.
    #[error("{}: {error}", path.display())]
    File {
        /// Its name.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// The file of --layout cannot be read, or is not a layout.
    #[error("{0}")]
    Input(String),
    /// The same work failed on the hosted machine, with whose counters the image is compared.
    #[error("the hosted machine: {0}")]
    Hosted(String),
    /// The report could not be written.
    #[error("cannot write the report: {0}")]
    Output(io::Error),
}
