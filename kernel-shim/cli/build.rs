//! Names the engine, the small kernel and the checker that are built in: by their version, and by a
//! hash of their sources. What a fuzzing campaign has counted is counted for them alone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What is hashed, from the root of the repository.
const SOURCES: [&str; 6] = [
    "pagetable/src",
    "tlb/src",
    "gather/src",
    "kernel-shim/src",
    "kernel-shim/hosted/src",
    "kernel-shim/adapter/src",
];

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    // FNV-1a, 64 bits: the same on every host, and of every compiler.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for folder in SOURCES {
        let folder = root.join(folder);
        println!("cargo::rerun-if-changed={}", folder.display());
        let mut files = Vec::new();
        // What is not there cannot be hashed: the version alone says what it is then.
        let _is_there = files_in(&folder, &mut files);
        files.sort();
        for file in files {
            add(file.strip_prefix(&root).unwrap_or(&file).as_os_str().as_encoded_bytes());
            add(&fs::read(&file).unwrap_or_default());
        }
    }
    println!("cargo::rustc-env=MMU_BUILD={}-{hash:016x}", env!("CARGO_PKG_VERSION"));
}

fn files_in(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files_in(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}
