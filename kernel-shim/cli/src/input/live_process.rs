//! Takes a [`Layout`] from a live Linux process.
//!
//! `/proc/PID/smaps` says which areas there are, `/proc/PID/pagemap` what their pages hold. The
//! process is not stopped: its list of areas is read before and after, and the whole is repeated
//! when the two differ. Pages that come or go meanwhile are missed or kept, one by one; stop the
//! process first where that matters.

use std::fs::File;
use std::io;
use std::path::Path;

use procfs::process::{MMPermissions, MMapPath, MemoryMap, MemoryMaps, Process, VmFlags};
use procfs::{KernelVersion, ProcError};

use crate::input::layout::{
    HUGE_PAGES, Layout, LayoutVma, PAGE_BYTES, PageState, Prot, Sharing, USER_END, VmaKind,
};
use crate::input::pagemap::{self, SmapsArea};

/// How often a process that keeps changing its areas is tried.
const TRIES: u32 = 8;

/// Why no layout could be taken.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Nothing runs under this number.
    #[error("there is no process {pid}")]
    NoProcess {
        /// The process.
        pid: i32,
    },
    /// The caller may not look into the process.
    #[error("process {pid} may not be read: only its owner or root can")]
    NotAllowed {
        /// The process.
        pid: i32,
    },
    /// The process has no user half: a kernel thread, or it ended.
    #[error(
        "process {pid} has no memory: expected a running user process, found a kernel thread or one that ended"
    )]
    NoMemory {
        /// The process.
        pid: i32,
    },
    /// Its areas changed during each try.
    #[error(
        "process {pid} changed its mappings during each of {TRIES} tries: stop it first, with kill -STOP {pid}"
    )]
    Unsteady {
        /// The process.
        pid: i32,
    },
    /// The kernel answered with something else.
    #[error("process {pid} cannot be read: {problem}")]
    Unreadable {
        /// The process.
        pid: i32,
        /// What the kernel said.
        problem: String,
    },
}

/// Takes a snapshot of process `pid`.
///
/// Its name and command are the kernel's; directories of mapped files are left out, those in the
/// command are not.
///
/// # Errors
///
/// [`CaptureError`], which names the process.
pub fn capture(pid: i32) -> Result<Layout, CaptureError> {
    let fail = |error| from_proc(pid, error);
    let process = Process::new(pid).map_err(fail)?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(|error| from_io(pid, &error))?;
    for _ in 0..TRIES {
        let status = process.status().map_err(fail)?;
        let areas = user_areas(process.smaps().map_err(fail)?);
        if areas.is_empty() {
            return Err(CaptureError::NoMemory { pid });
        }
        let vmas = areas.iter().map(|area| vma(&pagemap, area)).collect::<io::Result<Vec<_>>>();
        let areas_after = user_areas(process.maps().map_err(fail)?);
        if !same(&areas, &areas_after) {
            continue;
        }
        let layout = Layout {
            name: status.name,
            command: process.cmdline().map_err(fail)?.join(" "),
            kernel: kernel(),
            nr_threads: status.threads,
            nr_tables: status.vmpte.unwrap_or(0) * 1024 / PAGE_BYTES,
            vmas: vmas.map_err(|error| from_io(pid, &error))?,
        };
        return match layout.check() {
            Ok(()) => Ok(layout),
            Err(error) => Err(CaptureError::Unreadable { pid, problem: error.to_string() }),
        };
    }
    Err(CaptureError::Unsteady { pid })
}

/// The areas of the user half: without `[vsyscall]`.
fn user_areas(maps: MemoryMaps) -> Vec<MemoryMap> {
    maps.into_iter().filter(|map| map.address.1 <= USER_END).collect()
}

fn same(before: &[MemoryMap], after: &[MemoryMap]) -> bool {
    let key = |map: &MemoryMap| (map.address, map.perms, map.offset, map.dev, map.inode);
    before.iter().map(key).eq(after.iter().map(key))
}

fn vma(pagemap: &File, map: &MemoryMap) -> io::Result<LayoutVma> {
    let (start, end) = map.address;
    let pages = |fields: &[&str]| {
        let bytes = fields.iter().map(|field| map.extension.map.get(*field)).sum::<Option<u64>>()?;
        Some(bytes / PAGE_BYTES)
    };
    let nr_swapped = pages(&["Swap"]).unwrap_or(0);
    let huge = ["AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"];
    let area = SmapsArea {
        start,
        end,
        nr_huge_leaves: huge.iter().filter_map(|field| pages(&[field])).sum::<u64>() / HUGE_PAGES,
        nr_used: pages(&["Rss"]).unwrap_or(0) + nr_swapped,
    };
    let kind = kind(map);
    let mut runs = pagemap::mapped_runs(pagemap, area)?;
    // Markers, such as those of MADV_GUARD_INSTALL, look like swap. They name no place to give
    // back.
    runs.retain(|run| run.state != PageState::Swap || nr_swapped > 0);
    for run in &mut runs {
        run.state = match (&kind, run.state) {
            (VmaKind::Pfn(_), _) => PageState::Pfn,
            // The kernel's own page in an area without a file, such as `[uprobes]`: it shows as one
            // of a file.
            (VmaKind::Anon | VmaKind::Heap | VmaKind::Stack, PageState::File) => PageState::Anon,
            (VmaKind::Anon | VmaKind::Heap | VmaKind::Stack, PageState::FileHuge) => PageState::AnonHuge,
            (_, state) => state,
        };
    }
    Ok(LayoutVma {
        start,
        end,
        prot: Prot {
            read: map.perms.contains(MMPermissions::READ),
            write: map.perms.contains(MMPermissions::WRITE),
            exec: map.perms.contains(MMPermissions::EXECUTE),
        },
        sharing: if map.perms.contains(MMPermissions::SHARED) { Sharing::Shared } else { Sharing::Private },
        kind,
        nr_dirty: pages(&["Private_Dirty", "Shared_Dirty"]),
        nr_referenced: pages(&["Referenced"]),
        runs,
    })
}

/// What backs the area.
fn kind(map: &MemoryMap) -> VmaKind {
    let flags = map.extension.vm_flags;
    let name = match &map.pathname {
        MMapPath::Path(path) => file_name(path),
        MMapPath::Heap => return VmaKind::Heap,
        MMapPath::Stack => return VmaKind::Stack,
        MMapPath::Vdso => return VmaKind::Pfn("vdso".to_owned()),
        MMapPath::Vvar => return VmaKind::Pfn("vvar".to_owned()),
        MMapPath::Vsys(_) => "SYSV".to_owned(),
        MMapPath::Other(name) => name.clone(),
        MMapPath::TStack(_) | MMapPath::Vsyscall | MMapPath::Rollup | MMapPath::Anonymous => String::new(),
    };
    if flags.intersects(VmFlags::PF | VmFlags::IO) {
        VmaKind::Pfn(name)
    } else if flags.contains(VmFlags::HT) {
        VmaKind::HugeTlb(name)
    } else {
        match &map.pathname {
            MMapPath::Vsys(_) => VmaKind::Shared(name),
            MMapPath::Path(path) if is_in_memory_only(path) => VmaKind::Shared(name),
            MMapPath::Path(_) => VmaKind::File(name),
            _ if map.perms.contains(MMPermissions::SHARED) => VmaKind::Shared(name),
            _ => VmaKind::Anon,
        }
    }
}

/// Whether the mapping is shared memory that the kernel shows as a file.
pub(super) fn is_in_memory_only(path: &Path) -> bool {
    let path = path.to_string_lossy();
    ["/dev/shm/", "/memfd:"].iter().any(|prefix| path.starts_with(prefix))
        || without_deleted(&path) == "/dev/zero"
}

/// The last part of the path: directories would tell about the machine, and nobody needs them.
pub(super) fn file_name(path: &Path) -> String {
    without_deleted(&path.file_name().unwrap_or(path.as_os_str()).to_string_lossy()).to_owned()
}

fn without_deleted(path: &str) -> &str {
    path.strip_suffix(" (deleted)").unwrap_or(path)
}

/// The version without what distributions append.
fn kernel() -> String {
    KernelVersion::current().map_or_else(
        |_| "Linux".to_owned(),
        |version| format!("Linux {}.{}.{}", version.major, version.minor, version.patch),
    )
}

fn from_proc(pid: i32, error: ProcError) -> CaptureError {
    match error {
        ProcError::NotFound(_) => CaptureError::NoProcess { pid },
        ProcError::PermissionDenied(_) => CaptureError::NotAllowed { pid },
        ProcError::Io(error, _) => from_io(pid, &error),
        other => CaptureError::Unreadable { pid, problem: other.to_string() },
    }
}

fn from_io(pid: i32, error: &io::Error) -> CaptureError {
    match error.raw_os_error() {
        Some(libc::ENOENT) => CaptureError::NoProcess { pid },
        Some(libc::ESRCH) => CaptureError::NoMemory { pid },
        Some(libc::EACCES | libc::EPERM) => CaptureError::NotAllowed { pid },
        _ => CaptureError::Unreadable { pid, problem: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::process::{Child, Command, Stdio};

    use procfs::FromBufRead as _;

    use super::*;

    /// A process of ours that waits for input: nothing in it changes.
    struct Waiting(Child);

    impl Waiting {
        fn start() -> io::Result<Self> {
            let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            // Its answer says that it is past its start.
            child.stdin.as_mut().expect("piped").write_all(b"?")?;
            child.stdout.as_mut().expect("piped").read_exact(&mut [0])?;
            Ok(Self(child))
        }

        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).expect("process ids fit")
        }
    }

    impl Drop for Waiting {
        fn drop(&mut self) {
            // Already gone is as good; a zombie is all a failed wait leaves.
            let _killed = self.0.kill();
            let _waited = self.0.wait();
        }
    }

    #[test]
    fn a_live_process_is_captured_page_for_page_and_reads_back() {
        let waiting = Waiting::start().expect("every Linux has cat");
        let layout = capture(waiting.pid()).expect("a child may be read");
        assert_eq!((layout.name.as_str(), layout.nr_threads), ("cat", 1));
        let totals = layout.totals();
        assert!(totals.nr_anon > 0 && totals.nr_file > 0, "{totals:?}");
        let smaps =
            Process::new(waiting.pid()).and_then(|process| process.smaps()).expect("a child may be read");
        let rss_bytes = smaps.iter().filter_map(|map| map.extension.map.get("Rss")).sum::<u64>();
        // The kernel counts the vdso as resident.
        assert_eq!(totals.nr_resident() + totals.nr_pfn, rss_bytes / PAGE_BYTES);
        assert_eq!(Layout::parse("cat", &layout.to_string()), Ok(layout));
    }

    #[test]
    fn the_vsyscall_page_is_left_out() {
        let own = i32::try_from(std::process::id()).expect("process ids fit");
        let process = Process::new(own).expect("own process");
        let areas = user_areas(process.maps().expect("own maps"));
        assert!(areas.iter().all(|map| map.address.1 <= USER_END));
    }

    #[test]
    fn shared_memory_is_told_from_files_and_directories_are_dropped() {
        let kind_of = |path: &str| {
            let line = format!("7f0000000000-7f0000001000 rw-s 00000000 00:01 7 {path}\n");
            let maps = MemoryMaps::from_buf_read(line.as_bytes()).expect("a line of maps");
            kind(maps.iter().next().expect("one line"))
        };
        assert_eq!(kind_of("/dev/zero (deleted)"), VmaKind::Shared("zero".to_owned()));
        assert_eq!(kind_of("/dev/shm/a b"), VmaKind::Shared("a b".to_owned()));
        assert_eq!(kind_of("/memfd:x (deleted)"), VmaKind::Shared("memfd:x".to_owned()));
        assert_eq!(kind_of("/home/somebody/zero"), VmaKind::File("zero".to_owned()));
        assert_eq!(kind_of(""), VmaKind::Shared(String::new()));
        assert_eq!(kind_of("[vdso]"), VmaKind::Pfn("vdso".to_owned()));
    }

    #[test]
    fn a_process_that_does_not_exist_is_named() {
        // Above every limit the kernel accepts for pid_max.
        let error = capture(0x7fff_ffff).expect_err("no such process");
        assert_eq!(error.to_string(), "there is no process 2147483647");
    }

    #[test]
    fn a_kernel_thread_is_refused() {
        // Process 2 starts all kernel threads; in a container it is something else, or nothing.
        let is_kthreadd =
            Process::new(2).and_then(|process| process.status()).is_ok_and(|s| s.name == "kthreadd");
        if is_kthreadd {
            assert!(matches!(
                capture(2),
                Err(CaptureError::NoMemory { .. } | CaptureError::NotAllowed { .. })
            ));
        }
    }
}
