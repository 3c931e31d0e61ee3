//! Which pages of a live process are mapped, and how: `/proc/PID/pagemap`.
//!
//! Kernels since 6.7 answer in runs, through the `PAGEMAP_SCAN` ioctl, and say which pages are
//! mapped by 2 MiB leaves or are the page of zeroes. Older ones are read page by page; what they
//! leave out is in [`read`].

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::input::layout::{HUGE_PAGES, PAGE_BYTES, PageRun, PageState};

/// The part of an address space to look at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SmapsArea {
    /// First byte, page-aligned.
    pub(crate) start: u64,
    /// First byte after it, page-aligned.
    pub(crate) end: u64,
    /// 2 MiB leaves in it, as `/proc/PID/smaps` counts them. Only [`read`] needs to be told.
    pub(crate) nr_huge_leaves: u64,
    /// Base pages with anything in their entry, as far as `/proc/PID/smaps` knows.
    pub(crate) nr_used: u64,
}

/// Lists what is mapped in `area`, by ascending page.
///
/// # Errors
///
/// What the kernel answered, `ESRCH` once the process has ended.
pub(crate) fn mapped_runs(pagemap: &File, area: SmapsArea) -> io::Result<Vec<PageRun>> {
    match scan(pagemap, area) {
        // Kernels before 6.7: the file has no ioctl.
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => read(pagemap, area),
        result => result,
    }
}

/// `struct pm_scan_arg` of `PAGEMAP_SCAN`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `PAGEMAP_SCAN`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`: read and write, 96 bytes, type, number.
const PAGEMAP_SCAN: libc::Ioctl = 3 << 30 | 96 << 16 | 0x66 << 8 | 16;
const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<Region>() == 24);

const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_PFNZERO: u64 = 1 << 5;
const IS_HUGE: u64 = 1 << 6;

/// Asks the kernel for runs.
///
/// # Source
///
/// Linux: Documentation/admin-guide/mm/pagemap.rst, include/uapi/linux/fs.h.
fn scan(pagemap: &File, area: SmapsArea) -> io::Result<Vec<PageRun>> {
    const REGIONS_PER_CALL: usize = 1024;
    let mut regions = [Region::default(); REGIONS_PER_CALL];
    let mut runs = Vec::new();
    let mut start = area.start;
    while start < area.end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: 0,
            start,
            end: area.end,
            walk_end: start,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: REGIONS_PER_CALL as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_FILE | IS_PRESENT | IS_SWAPPED | IS_PFNZERO | IS_HUGE,
        };
        #[expect(unsafe_code, reason = "no safe wrapper of this ioctl exists")]
        // SAFETY: the request reads and writes one `ScanArg`, whose size is asserted above and in
        // `size`, and `arg` is exclusively borrowed for the call. Through `vec` the kernel writes
        // at most `vec_len` regions, and `regions` is that long, aligned, alive and not borrowed
        // otherwise until the call returns. Any bytes are a `Region`.
        let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
        for region in regions.iter().take(filled) {
            if let Some(state) = state(region.categories) {
                push(&mut runs, area, region.start..region.end, state);
            }
        }
        // Not `walk_end`: after more than 512 regions the kernel (seen on 6.18) can leave it behind
        // what it returned.
        match regions.get(filled.wrapping_sub(1)) {
            Some(last) if filled == REGIONS_PER_CALL && last.end > start => start = last.end,
            _ => break,
        }
    }
    Ok(runs)
}

fn state(categories: u64) -> Option<PageState> {
    let is = |category| categories & category != 0;
    match (is(IS_PRESENT), is(IS_HUGE)) {
        (true, true) if is(IS_PFNZERO) => Some(PageState::ZeroHuge),
        (true, true) if is(IS_FILE) => Some(PageState::FileHuge),
        (true, true) => Some(PageState::AnonHuge),
        (true, false) if is(IS_PFNZERO) => Some(PageState::Zero),
        (true, false) if is(IS_FILE) => Some(PageState::File),
        (true, false) => Some(PageState::Anon),
        (false, _) => is(IS_SWAPPED).then_some(PageState::Swap),
    }
}

/// Reads one entry a page.
///
/// The file does not say which pages share a 2 MiB leaf: the first aligned blocks with 512 pages of
/// one kind are taken, as many as `area` has leaves. Nor does it show the page of zeroes, which
/// counts as an anonymous page here.
///
/// # Source
///
/// Linux: Documentation/admin-guide/mm/pagemap.rst.
fn read(pagemap: &File, area: SmapsArea) -> io::Result<Vec<PageRun>> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE: u64 = 1 << 61;
    const ENTRY_BYTES: u64 = 8;
    const CHUNK_BYTES: usize = 1 << 16;
    let mut runs = Vec::new();
    // Terabytes are reserved and never touched; reading them entry by entry would take minutes.
    let end = if area.nr_used == 0 { area.start } else { area.end };
    let mut page = area.start / PAGE_BYTES;
    let mut chunk = [0; CHUNK_BYTES];
    while page < end / PAGE_BYTES {
        let filled = pagemap.read_at(&mut chunk, page * ENTRY_BYTES)?;
        let (entries, _) = chunk.split_at(filled).0.as_chunks::<8>();
        if entries.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for entry in entries.iter().map(|bytes| u64::from_ne_bytes(*bytes)) {
            if page == end / PAGE_BYTES {
                break;
            }
            let state = match entry & (PRESENT | SWAPPED | FILE) {
                entry if entry & (PRESENT | FILE) == PRESENT | FILE => PageState::File,
                entry if entry & PRESENT != 0 => PageState::Anon,
                entry if entry & SWAPPED != 0 => PageState::Swap,
                _ => {
                    page += 1;
                    continue;
                }
            };
            push(&mut runs, area, page * PAGE_BYTES..(page + 1) * PAGE_BYTES, state);
            page += 1;
        }
    }
    Ok(with_huge_leaves(&runs, area))
}

/// Turns the first aligned blocks of 512 pages into 2 MiB leaves, until `area` has as many as it
/// should.
fn with_huge_leaves(small: &[PageRun], area: SmapsArea) -> Vec<PageRun> {
    let mut left = area.nr_huge_leaves;
    let mut runs = Vec::new();
    let base = area.start / PAGE_BYTES;
    for run in small {
        let huge_state = match run.state {
            PageState::Anon => PageState::AnonHuge,
            PageState::File => PageState::FileHuge,
            _ => {
                runs.push(*run);
                continue;
            }
        };
        let end = run.first_page + run.nr_pages;
        let huge_start = (base + run.first_page).next_multiple_of(HUGE_PAGES) - base;
        let nr_leaves = (end.saturating_sub(huge_start) / HUGE_PAGES).min(left);
        left -= nr_leaves;
        let (huge_start, huge_end) = match nr_leaves {
            0 => (end, end),
            nr_leaves => (huge_start, huge_start + nr_leaves * HUGE_PAGES),
        };
        for (first_page, end, state) in [
            (run.first_page, huge_start, run.state),
            (huge_start, huge_end, huge_state),
            (huge_end, end, run.state),
        ] {
            if first_page < end {
                runs.push(PageRun { first_page, nr_pages: end - first_page, state });
            }
        }
    }
    runs
}

/// Appends the pages of `bytes`, to the last run where they continue it.
fn push(runs: &mut Vec<PageRun>, area: SmapsArea, bytes: core::ops::Range<u64>, state: PageState) {
    let first_page = (bytes.start - area.start) / PAGE_BYTES;
    let nr_pages = (bytes.end - bytes.start) / PAGE_BYTES;
    match runs.last_mut() {
        Some(last) if last.state == state && last.first_page + last.nr_pages == first_page => {
            last.nr_pages += nr_pages;
        }
        _ => runs.push(PageRun { first_page, nr_pages, state }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Above the size (32 MiB) up to which an allocator may hand out memory that was used before.
    const NR_PAGES: usize = 10240;

    const TOUCHED: [usize; 3] = [3, 4, 9000];

    fn own_pagemap() -> File {
        File::open("/proc/self/pagemap").expect("a process may read its own page map")
    }

    /// Memory of which only the pages [`TOUCHED`] are touched, and the area of its pages.
    fn touched() -> (Vec<u8>, SmapsArea) {
        let mut bytes = vec![0_u8; (NR_PAGES + 1) * 4096];
        let start = (bytes.as_ptr().addr() as u64).next_multiple_of(PAGE_BYTES);
        let first = usize::try_from(start).expect("64-bit") - bytes.as_ptr().addr();
        for page in TOUCHED {
            bytes[first + page * 4096] = 1;
        }
        let area =
            SmapsArea { start, end: start + NR_PAGES as u64 * PAGE_BYTES, nr_huge_leaves: 0, nr_used: 3 };
        (bytes, area)
    }

    fn run(first_page: u64, nr_pages: u64, state: PageState) -> PageRun {
        PageRun { first_page, nr_pages, state }
    }

    fn pages(runs: &[PageRun]) -> Vec<u64> {
        runs.iter().flat_map(|run| run.first_page..run.first_page + run.nr_pages).collect()
    }

    #[test]
    fn touched_pages_are_found_and_most_others_are_not() {
        let (_bytes, area) = touched();
        let found = pages(&read(&own_pagemap(), area).expect("the own page map is readable"));
        assert!(TOUCHED.iter().all(|&page| found.contains(&(page as u64))), "{found:?}");
        // Where every area gets 2 MiB pages, each touch brings 512 pages.
        assert!(found.len() <= TOUCHED.len() * 512, "{found:?}");
    }

    #[test]
    fn scanning_and_reading_find_the_same_pages() {
        let (_bytes, area) = touched();
        match scan(&own_pagemap(), area) {
            Ok(runs) => assert_eq!(pages(&runs), pages(&read(&own_pagemap(), area).expect("readable"))),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{error}"),
        }
    }

    #[test]
    fn many_small_runs_are_each_found_once() {
        let bytes = vec![0_u8; (NR_PAGES + 1) * 4096];
        let start = (bytes.as_ptr().addr() as u64).next_multiple_of(PAGE_BYTES);
        let area =
            SmapsArea { start, end: start + NR_PAGES as u64 * PAGE_BYTES, nr_huge_leaves: 0, nr_used: 1 };
        let mut bytes = bytes;
        for touched in [600, 700, 1500, 2500] {
            for page in 0..touched {
                bytes[page * 4 * 4096 + 4096] = 1;
            }
            match scan(&own_pagemap(), area) {
                Ok(runs) => assert_eq!(pages(&runs), pages(&read(&own_pagemap(), area).expect("readable"))),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{error}"),
            }
        }
    }

    #[test]
    fn an_area_nobody_touched_is_not_read() {
        let area = SmapsArea { start: 1 << 20, end: 1 << 46, nr_huge_leaves: 0, nr_used: 0 };
        assert_eq!(read(&own_pagemap(), area).expect("nothing is read"), []);
    }

    #[test]
    fn guessed_huge_leaves_are_aligned_and_no_more_than_stated() {
        // The area starts 4 pages below a 2 MiB boundary.
        let start = (4 << 20) - 4 * PAGE_BYTES;
        let area = SmapsArea { start, end: start + (8 << 20), nr_huge_leaves: 1, nr_used: 1 };
        let guessed = with_huge_leaves(&[run(0, 1100, PageState::Anon)], area);
        assert_eq!(
            guessed,
            [run(0, 4, PageState::Anon), run(4, 512, PageState::AnonHuge), run(516, 584, PageState::Anon)]
        );
        let too_short = [run(5, 600, PageState::Anon)];
        assert_eq!(with_huge_leaves(&too_short, area), too_short);
    }

    #[test]
    fn a_category_decides_one_state() {
        assert_eq!(state(IS_PRESENT | IS_HUGE | IS_PFNZERO), Some(PageState::ZeroHuge));
        assert_eq!(state(IS_PRESENT | IS_HUGE | IS_FILE), Some(PageState::FileHuge));
        assert_eq!(state(IS_PRESENT | IS_PFNZERO), Some(PageState::Zero));
        assert_eq!(state(IS_SWAPPED | IS_FILE), Some(PageState::Swap));
        assert_eq!(state(0), None);
    }
}
