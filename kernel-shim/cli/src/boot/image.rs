//! Where the bootable image is, and how it is built.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::boot::error::BootError;

/// What names the image in the messages of cargo.
const PACKAGE: &str = "mmu-boot";

/// Builds the image from the source tree that this command was built from, if it is not up to date,
/// and returns where it is.
pub(crate) fn build_image() -> Result<PathBuf, BootError> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    if !root.join("kernel-shim/boot/image.toml").is_file() {
        return Err(BootError::NoSources(root));
    }
    if io::stderr().is_terminal() {
        let _ = writeln!(io::stderr(), "building the image ...");
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(&cargo)
        .args(["build", "--config", "kernel-shim/boot/image.toml", "--profile", "image", "-p", PACKAGE])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(&root)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| BootError::Cargo(format!("cannot run {}: {error}", cargo.display())))?;
    if !output.status.success() {
        return Err(BootError::Cargo(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let image = messages.lines().filter_map(|line| serde_json::from_str(line).ok()).find_map(executable);
    image.ok_or_else(|| BootError::Cargo("it did not say where the image is".to_owned()))
}

/// The executable that a message of cargo is about, if it is the image.
fn executable(message: Value) -> Option<PathBuf> {
    let is_image = message["reason"] == "compiler-artifact" && message["target"]["name"] == PACKAGE;
    message["executable"].as_str().filter(|_| is_image).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_message_about_the_image_names_it() {
        let of = |name: &str, executable: Value| serde_json::json!({"reason": "compiler-artifact", "target": {"name": name}, "executable": executable});
        assert_eq!(executable(of("mmu-boot", "/a/b".into())), Some(PathBuf::from("/a/b")));
        assert_eq!(executable(of("mmu-boot", Value::Null)), None);
        assert_eq!(executable(of("mmu-gather", "/a/b".into())), None);
        assert_eq!(executable(serde_json::json!({"reason": "build-finished"})), None);
    }
}
