//! The layouts and logs that come with the command, captured from real programs.

/// A file built into the command.
#[derive(Clone, Copy, Debug)]
pub struct Bundled {
    /// Name, without the ending.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! bundle {
    ($folder:literal, $ending:literal: $($name:literal,)*) => {
        &[$(Bundled {
            name: $name,
            text: include_str!(concat!("../../../../tests/", $folder, "/", $name, $ending)),
        },)*]
    };
}

/// Address spaces of real programs at work; `tests/layouts/README.md` says how each was captured.
pub const LAYOUTS: &[Bundled] = bundle!("layouts", ".layout":
    "chromium-browser",
    "chromium-renderer",
    "gcc-cc1plus",
    "gdb-symbols",
    "git-repack",
    "jvm-g1-thp",
    "jvm-parallel",
    "node-server",
    "postgres-backend",
    "python-numpy-5g",
    "python-pandas",
    "redis-5g",
    "redis-bgsave-child",
    "redis-bgsave-parent",
    "redis-server",
    "redis-swapped",
    "rustc-release",
    "sqlite-query",
);

/// Logs of the memory system calls of real programs; `tests/traces/README.md` says how each was
/// recorded.
pub const TRACES: &[Bundled] = bundle!("traces", ".strace":
    "chromium-start",
    "gcc-hello",
    "git-repack",
    "jvm-streams",
    "node-worker",
    "python-json",
    "python-numpy",
    "redis-bgsave",
    "rustc-hello",
    "sort-parallel",
);

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(folder: &str, ending: &str) -> Vec<String> {
        let path = format!("{}/../../tests/{folder}", env!("CARGO_MANIFEST_DIR"));
        let entries = std::fs::read_dir(path).expect("the folder is in the tree");
        let names = entries.map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8"));
        let mut names: Vec<_> =
            names.filter_map(|name| name.strip_suffix(ending).map(String::from)).collect();
        names.sort();
        names
    }

    #[test]
    fn every_layout_and_log_in_the_tree_is_bundled() {
        let bundled = |list: &[Bundled]| list.iter().map(|one| one.name.to_owned()).collect::<Vec<_>>();
        assert_eq!(bundled(LAYOUTS), names_in("layouts", ".layout"));
        assert_eq!(bundled(TRACES), names_in("traces", ".strace"));
    }
}
