//! The same shapes in the Linux that runs the benches: munmap, madvise and exit, through system
//! calls.
//!
//! Linux does more: real pages, an LRU, cgroup and rss accounting, and its page allocator.
#![expect(unsafe_code, reason = "system calls")]

use core::ptr;
use core::sync::atomic::{AtomicI64, Ordering};
use std::io;

use mmu_gather::pagetable::{Level, VirtRange};

use mmu_measured::shape::{Shape, Workload};

/// How the pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// munmap of each area.
    Munmap,
    /// madvise(MADV_DONTNEED) of each area; tables stay.
    DontNeed,
    /// Exit of the process.
    Exit,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Munmap, Self::DontNeed, Self::Exit];

    /// The row's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Munmap => "Linux: munmap",
            Self::DontNeed => "Linux: madvise(MADV_DONTNEED)",
            Self::Exit => "Linux: exit",
        }
    }

    /// Whether the row means anything for `workload`. Linux chooses the frames, so there is no W6.
    #[must_use]
    pub const fn applies_to(self, workload: Workload) -> bool {
        match workload {
            Workload::W6Shuffled => false,
            Workload::W7OnePage | Workload::Calls(_) | Workload::CallsWithTable(_) => {
                !matches!(self, Self::Exit)
            }
            _ => true,
        }
    }
}

/// Where shapes are mapped, relative to where they say.
const SHIFT: u64 = 0x3000_0000_0000;

/// Nanoseconds a leaf, by one sample in a process forked for it; the fork must be a small one, so
/// call this before the benches' memory is used.
///
/// # Errors
/// What the operating system refused.
pub fn sample(shape: &Shape, way: Way) -> io::Result<f64> {
    let shared = SharedWord::new()?;
    // SAFETY: the process has one thread; the copy makes system calls and exits.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        let code = match in_child(shape, way, &shared) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(1),
        };
        // SAFETY: ends the copy at once; for `Exit` this is what is measured.
        unsafe { libc::_exit(code) }
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let end = now();
    if !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 0 {
        return Err(io::Error::from_raw_os_error(libc::WEXITSTATUS(status)));
    }
    let word = shared.word().load(Ordering::Acquire);
    let nanoseconds = if way == Way::Exit { end - word } else { word };
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    Ok(nanoseconds as f64 / shape.leaves.len() as f64)
}

fn in_child(shape: &Shape, way: Way, shared: &SharedWord) -> io::Result<()> {
    populate(shape)?;
    let start = now();
    match way {
        Way::Exit => {
            shared.word().store(now(), Ordering::Release);
            return Ok(());
        }
        Way::Munmap => {
            for area in &shape.areas {
                let (address, bytes) = place(*area);
                // SAFETY: an area of our own that nothing in this process uses.
                check(unsafe { libc::munmap(address, bytes) })?;
            }
        }
        Way::DontNeed => {
            for area in &shape.areas {
                let (address, bytes) = place(*area);
                // SAFETY: as above.
                check(unsafe { libc::madvise(address, bytes, libc::MADV_DONTNEED) })?;
            }
        }
    }
    shared.word().store(now() - start, Ordering::Release);
    Ok(())
}

/// Maps everything in one stretch, then gives each page a frame by writing to it.
fn populate(shape: &Shape) -> io::Result<()> {
    let ends = shape.areas.iter().map(|area| area.end());
    let starts = shape.areas.iter().map(|area| area.start());
    let (Some(start), Some(end)) = (starts.min(), ends.max()) else { return Ok(()) };
    let whole = VirtRange::new(start & !0x3f_ffff, (end | 0x3f_ffff) + 1).map_err(io::Error::other)?;
    let (address, bytes) = place(whole);
    // Areas with gaps between them are areas of their own in Linux, too.
    let gaps = shape.areas.len() > 1 && !shape.is_one_by_one();
    let rights = if gaps { libc::PROT_NONE } else { libc::PROT_READ | libc::PROT_WRITE };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: a new mapping where there is none.
    let mapped = unsafe { libc::mmap(address, bytes, rights, flags, -1, 0) };
    if mapped != address {
        return Err(io::Error::last_os_error());
    }
    let advice = if shape.level > Level::Pte { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: the mapping just made.
    check(unsafe { libc::madvise(address, bytes, advice) })?;
    if gaps {
        for area in &shape.areas {
            let (address, bytes) = place(*area);
            // SAFETY: inside the mapping just made.
            check(unsafe { libc::mprotect(address, bytes, libc::PROT_READ | libc::PROT_WRITE) })?;
        }
    }
    for leaf in shape.leaves.iter().chain(&shape.staying) {
        let page = ptr::with_exposed_provenance_mut::<u8>(to_usize(leaf.address + SHIFT));
        // SAFETY: inside the mapping, writable; nothing else is there.
        unsafe { page.write_volatile(1) };
    }
    Ok(())
}

fn place(area: VirtRange) -> (*mut libc::c_void, usize) {
    (ptr::with_exposed_provenance_mut(to_usize(area.start() + SHIFT)), to_usize(area.len_bytes()))
}

#[expect(clippy::cast_possible_truncation, reason = "x86_64: usize has 64 bits")]
const fn to_usize(number: u64) -> usize {
    number as usize
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Nanoseconds of the monotonic clock, which all processes share.
fn now() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// A number that parent and child both see.
struct SharedWord(*mut libc::c_void);

impl SharedWord {
    fn new() -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping of a page, wherever there is room.
        let page =
            unsafe { libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if page == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(page)) }
    }

    fn word(&self) -> &AtomicI64 {
        // SAFETY: a zeroed page that lives as long as `self`, used through this atomic only.
        unsafe { AtomicI64::from_ptr(self.0.cast()) }
    }
}

impl Drop for SharedWord {
    fn drop(&mut self) {
        // SAFETY: the page mapped in `new`; no reference to it is left.
        unsafe { libc::munmap(self.0, 4096) };
    }
}
