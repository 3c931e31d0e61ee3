//! A snapshot of one process's address space: which areas it has, and what every page of them
//! holds.
//!
//! ```text
//! Layout                 one process at one moment
//!   LayoutVma            one line of /proc/PID/maps: [start, end), protection, what backs it
//!     PageRun            neighbouring pages in the same state, counted from the start of the area
//! ```
//!
//! A page that no run names has no page-table entry. Runs instead of pages keep a snapshot of
//! gigabytes in kilobytes, so that real programs can be committed as test input. The text form is
//! in `tests/layouts/README.md`.
//!
//! A parsed [`Layout`] has sorted areas that do not overlap and lie in the user half, and sorted
//! runs that do not overlap, stay inside their area, hold what such an area can and, where huge,
//! start and end on a 2 MiB boundary. The fields are public, so code that builds one by hand proves
//! nothing: [`Layout::check`] repeats every check.

use core::fmt;

/// Bytes in one base page of x86_64.
pub const PAGE_BYTES: u64 = 4096;

/// Base pages under one 2 MiB leaf of x86_64.
pub const HUGE_PAGES: u64 = 512;

/// Base pages that a layout may hold in all: 128 GiB. A simulated machine needs about 50 bytes of
/// memory for each.
pub const MOST_PAGES: u64 = 32 << 20;

/// First byte a user mapping may not use: the last page below the 47-bit hole stays empty.
///
/// # Source
///
/// Linux: TASK_SIZE_MAX with 4-level paging, arch/x86/include/asm/page_64.h.
pub const USER_END: u64 = 0x7fff_ffff_f000;

/// The address space of one process at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Short name, for reports.
    pub name: String,
    /// What ran, and what it was doing.
    pub command: String,
    /// Kernel the snapshot was taken on.
    pub kernel: String,
    /// Threads that shared the address space: as many CPUs can hold its translations at once.
    pub nr_threads: u64,
    /// Page-table pages below the root, as the kernel counted them (`VmPTE` of /proc/PID/status).
    ///
    /// At least what the runs need; more where tables outlived their pages.
    pub nr_tables: u64,
    /// The mapped areas, by ascending address.
    pub vmas: Vec<LayoutVma>,
}

/// One mapped area, `start..end` in bytes. Linux: vm_area_struct.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutVma {
    /// First byte, page-aligned.
    pub start: u64,
    /// First byte after the area, page-aligned.
    pub end: u64,
    /// What the program may do with the bytes.
    pub prot: Prot,
    /// Whether writes reach what backs the area.
    pub sharing: Sharing,
    /// What backs the area.
    pub kind: VmaKind,
    /// Resident base pages that are dirty, where the kernel said so.
    ///
    /// Only the count is known, not which pages: a page is dirty by its entry or by its frame's
    /// metadata.
    pub nr_dirty: Option<u64>,
    /// Resident base pages that were accessed since the kernel last looked, where the kernel said
    /// so.
    pub nr_referenced: Option<u64>,
    /// What the pages hold, by ascending page. Pages in no run are not mapped.
    pub runs: Vec<PageRun>,
}

/// Neighbouring pages in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// First page, counted from the start of the area.
    pub first_page: u64,
    /// Base pages in the run, also where they are mapped by 2 MiB leaves.
    pub nr_pages: u64,
    /// What each of them holds.
    pub state: PageState,
}

/// What the page-table entry of a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PageState {
    /// A private anonymous page, 4 KiB.
    Anon,
    /// A page of a file or of shared memory, 4 KiB.
    File,
    /// The shared page of zeroes, 4 KiB: mapped, but with no frame to give back.
    Zero,
    /// A frame the kernel does not count, 4 KiB: a device's, or the kernel's own.
    Pfn,
    /// An anonymous page mapped by one 2 MiB leaf.
    AnonHuge,
    /// A page of a file or of shared memory mapped by one 2 MiB leaf.
    FileHuge,
    /// The shared 2 MiB page of zeroes.
    ZeroHuge,
    /// Not present: the entry names a place in swap.
    Swap,
}

/// What the program may do with the bytes of an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prot {
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub exec: bool,
}

/// Whether writes to an area reach what backs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// `MAP_PRIVATE`: a write gives the process its own page.
    Private,
    /// `MAP_SHARED`.
    Shared,
}

/// What backs an area. Names carry no directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmaKind {
    /// Memory without a file.
    Anon,
    /// The area that `brk` moves.
    Heap,
    /// The main thread's stack, which grows down.
    Stack,
    /// A file.
    File(String),
    /// Memory that several processes can map: memfd, /dev/shm, System V, shared anonymous mappings.
    Shared(String),
    /// Pages reserved in hugetlbfs.
    HugeTlb(String),
    /// Frames the kernel does not count: `VM_PFNMAP`, `VM_IO`, vdso, vvar.
    Pfn(String),
}

/// Sums over a layout, in base pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Areas.
    pub nr_vmas: u64,
    /// Runs of pages in all areas.
    pub nr_runs: u64,
    /// Pages of address space inside areas, present or not.
    pub nr_virtual: u64,
    /// Pages in [`PageState::Anon`].
    pub nr_anon: u64,
    /// Pages in [`PageState::File`].
    pub nr_file: u64,
    /// Pages in [`PageState::Zero`] or [`PageState::ZeroHuge`].
    pub nr_zero: u64,
    /// Pages in [`PageState::Pfn`].
    pub nr_pfn: u64,
    /// Pages in [`PageState::AnonHuge`] or [`PageState::FileHuge`]: 512 for each 2 MiB leaf.
    pub nr_huge: u64,
    /// Pages in [`PageState::Swap`].
    pub nr_swap: u64,
}

impl Layout {
    /// Adds up what the runs hold.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for vma in &self.vmas {
            totals.nr_vmas += 1;
            totals.nr_virtual += vma.nr_pages();
            for run in &vma.runs {
                totals.nr_runs += 1;
                *match run.state {
                    PageState::Anon => &mut totals.nr_anon,
                    PageState::File => &mut totals.nr_file,
                    PageState::Zero | PageState::ZeroHuge => &mut totals.nr_zero,
                    PageState::Pfn => &mut totals.nr_pfn,
                    PageState::AnonHuge | PageState::FileHuge => &mut totals.nr_huge,
                    PageState::Swap => &mut totals.nr_swap,
                } += run.nr_pages;
            }
        }
        totals
    }
}

impl LayoutVma {
    /// Base pages of address space, present or not.
    #[must_use]
    pub fn nr_pages(&self) -> u64 {
        self.end.saturating_sub(self.start) / PAGE_BYTES
    }

    /// First byte of `run`, which belongs to this area.
    #[must_use]
    pub fn address_of(&self, run: &PageRun) -> u64 {
        self.start + run.first_page * PAGE_BYTES
    }
}

impl VmaKind {
    /// The states that pages of such an area can have. Frames that the kernel does not count are in
    /// areas of such frames and nowhere else; pages of a file are where a file is.
    #[must_use]
    pub const fn states(&self) -> &'static [PageState] {
        use PageState::{Anon, AnonHuge, File, FileHuge, Pfn, Swap, Zero, ZeroHuge};
        match self {
            Self::Anon | Self::Heap | Self::Stack => &[Anon, Zero, AnonHuge, ZeroHuge, Swap],
            Self::File(_) | Self::Shared(_) | Self::HugeTlb(_) => {
                &[Anon, File, Zero, AnonHuge, FileHuge, ZeroHuge, Swap]
            }
            Self::Pfn(_) => &[Pfn],
        }
    }

    /// The word of the text form.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Anon => "anon",
            Self::Heap => "heap",
            Self::Stack => "stack",
            Self::File(_) => "file",
            Self::Shared(_) => "shared",
            Self::HugeTlb(_) => "hugetlb",
            Self::Pfn(_) => "pfn",
        }
    }
}

impl PageState {
    /// Every state, in the order of the declaration.
    pub const ALL: [Self; 8] = [
        Self::Anon,
        Self::File,
        Self::Zero,
        Self::Pfn,
        Self::AnonHuge,
        Self::FileHuge,
        Self::ZeroHuge,
        Self::Swap,
    ];

    /// The word of the text form.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Anon => "anon",
            Self::File => "file",
            Self::Zero => "zero",
            Self::Pfn => "pfn",
            Self::AnonHuge => "anon-huge",
            Self::FileHuge => "file-huge",
            Self::ZeroHuge => "zero-huge",
            Self::Swap => "swap",
        }
    }

    /// Whether the entry is a 2 MiB leaf.
    #[must_use]
    pub const fn is_huge(self) -> bool {
        matches!(self, Self::AnonHuge | Self::FileHuge | Self::ZeroHuge)
    }

    /// Whether the hardware can translate through the entry, so that a TLB may hold it.
    #[must_use]
    pub const fn is_present(self) -> bool {
        !matches!(self, Self::Swap)
    }
}

impl Totals {
    /// Pages a TLB may hold: all but the swapped ones.
    #[must_use]
    pub const fn nr_present(&self) -> u64 {
        self.nr_anon + self.nr_file + self.nr_zero + self.nr_pfn + self.nr_huge
    }

    /// Pages whose frame counts as the process's memory: what `RSS` means.
    #[must_use]
    pub const fn nr_resident(&self) -> u64 {
        self.nr_anon + self.nr_file + self.nr_huge
    }
}

impl fmt::Display for Prot {
    /// Three letters as in /proc/PID/maps: `r-x`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |set, letter| if set { letter } else { "-" };
        write!(f, "{}{}{}", letter(self.read, "r"), letter(self.write, "w"), letter(self.exec, "x"))
    }
}
