//! Which calls of a log change an address space: those that `teardown trace` makes, and those it
//! cannot make, which are counted.

/// Calls that are made.
pub(crate) const MEMORY_CALLS: [&str; 18] = [
    "mmap",
    "mmap2",
    "old_mmap",
    "munmap",
    "mremap",
    "brk",
    "madvise",
    "mprotect",
    "pkey_mprotect",
    "clone",
    "clone3",
    "fork",
    "vfork",
    "execve",
    "execveat",
    "exit",
    "_exit",
    "exit_group",
];

pub(crate) fn is_memory_call(name: &str) -> bool {
    MEMORY_CALLS.contains(&name)
}

/// Calls that map memory, give it up or change it, and are not made: what follows them may not be
/// what the program did.
pub(crate) fn is_dropped_call(name: &str) -> bool {
    const NAMES: [&str; 19] = [
        "shmat",
        "shmdt",
        "mlock",
        "mlock2",
        "mlockall",
        "munlock",
        "munlockall",
        "userfaultfd",
        "mbind",
        "move_pages",
        "migrate_pages",
        "remap_file_pages",
        "process_madvise",
        "process_mrelease",
        "map_shadow_stack",
        "mseal",
        "uselib",
        "io_setup",
        "io_destroy",
    ];
    NAMES.contains(&name)
}

/// The call by which a thread ends itself alone.
pub(crate) fn is_exit(name: &str) -> bool {
    matches!(name, "exit" | "_exit")
}
