//! `/proc/PID/maps` and `/proc/PID/smaps`, as they were printed or pasted, as a [`Layout`].
//!
//! `smaps` says how many pages of each area are there, and not which: the first ones are taken,
//! large ones where they can be. `maps` does not say that either: `ASSUMED_PAGES` of each area
//! that a program can use are taken to be there. What was assumed or skipped is said in remarks.

use crate::input::layout::{
    HUGE_PAGES, Layout, LayoutError, LayoutProblem, LayoutVma, MOST_PAGES, PAGE_BYTES, PageRun, PageState,
    Prot, Sharing, USER_END, VmaKind,
};
use crate::input::lines::plain;
use crate::input::live_process::{file_name, is_in_memory_only};
use crate::output::words::counted;

/// Pages of each area that are taken to be there where the text does not say: 16 MiB.
pub(crate) const ASSUMED_PAGES: u64 = 4096;

/// A layout that was read, and what is to be said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadLayout {
    /// The layout.
    pub layout: Layout,
    /// What was assumed, and what was skipped.
    pub remarks: Vec<String>,
}

/// Whether a line of `text` is one of `/proc/PID/maps`.
pub(crate) fn is_maps(text: &str) -> bool {
    text.lines().any(|line| area_line(unquoted(&plain(line))).is_some())
}

/// Reads the text of `/proc/PID/maps` or `smaps`; `source` is the name errors carry, `name` the
/// layout's.
///
/// # Errors
/// An area that a process on x86_64 with page tables of four levels cannot have, or pages that it
/// cannot hold, as a [`LayoutError`] that names the source and the line.
pub fn parse_maps(source: &str, name: &str, text: &str) -> Result<ReadLayout, LayoutError> {
    let at_line = |line, problem| LayoutError { source_name: source.to_owned(), line, problem };
    let mut areas: Vec<Area> = Vec::new();
    let (mut nr_skipped, mut first_skipped, mut in_kernel) = (0, 0, false);
    for (line, number) in text.lines().zip(1..) {
        let line = plain(line);
        let line = unquoted(&line);
        if let Some(area) = area_line(line) {
            // The one page that the kernel shows and no program has.
            in_kernel = area.start >= 0xffff_8000_0000_0000;
            if !in_kernel {
                let previous_end = areas.last().map_or(0, |area| area.end);
                area.check(previous_end).map_err(|problem| at_line(number, problem))?;
                areas.push(Area { line: number, ..area });
            }
        } else if let Some(field) = field(line) {
            if let Some(area) = areas.last_mut().filter(|_| !in_kernel) {
                area.field(field).map_err(|problem| at_line(number, problem))?;
            }
        } else if !line.is_empty() && !line.trim_matches('.').is_empty() {
            nr_skipped += 1;
            first_skipped = if first_skipped == 0 { number } else { first_skipped };
        }
    }
    if areas.is_empty() {
        let expected = "an area of a process, as in /proc/PID/maps";
        let found = text.lines().next().unwrap_or_default().to_owned();
        return Err(at_line(1, LayoutProblem::Expected { expected, found }));
    }
    let nr_unknown = areas.iter().filter(|area| area.resident.is_none()).count() as u64;
    let mut vmas = Vec::with_capacity(areas.len());
    let mut nr_pages = 0;
    for area in areas {
        let line = area.line;
        let vma = area.vma().map_err(|problem| at_line(line, problem))?;
        nr_pages += vma.runs.iter().map(|run| run.nr_pages).sum::<u64>();
        if nr_pages > MOST_PAGES {
            return Err(at_line(line, LayoutProblem::TooManyPages));
        }
        vmas.push(vma);
    }
    let mut layout = Layout {
        name: name.to_owned(),
        command: String::new(),
        kernel: "Linux".to_owned(),
        nr_threads: 1,
        nr_tables: 0,
        vmas,
    };
    layout.nr_tables = tables_needed(&layout);
    let mut remarks = Vec::new();
    if nr_unknown > 0 {
        remarks.push(format!(
            "{source}: which pages are there was assumed: of {} the first {} MiB, where a program may use them",
            counted(nr_unknown, "area", "areas"),
            (ASSUMED_PAGES * PAGE_BYTES) >> 20
        ));
    }
    if nr_unknown < layout.vmas.len() as u64 {
        remarks.push(format!(
            "{source}: smaps says how many pages are there; that they are the first was assumed"
        ));
    }
    if nr_skipped > 0 {
        let lines = counted(nr_skipped, "line", "lines");
        remarks.push(format!(
            "{source}:{first_skipped}: {lines} skipped from here on that say nothing of an area"
        ));
    }
    layout.check().map_err(|error| at_line(1, error.problem))?;
    Ok(ReadLayout { layout, remarks })
}

/// A line without what quoting puts in front of it.
fn unquoted(line: &str) -> &str {
    line.trim_start_matches([' ', '>', '|', '`']).trim_ascii_end()
}

#[derive(Debug, PartialEq, Eq)]
struct Area {
    line: usize,
    start: u64,
    end: u64,
    prot: Prot,
    sharing: Sharing,
    path: String,
    /// Pages, as smaps counts them; `None` where it says nothing.
    resident: Option<u64>,
    anonymous: u64,
    swapped: u64,
    hugetlb: u64,
    huge_leaves: u64,
    dirty: Option<u64>,
    referenced: Option<u64>,
    is_pfn: bool,
    is_hugetlb: bool,
}

/// `START-END PERMS OFFSET DEVICE INODE PATH`; what follows the permissions may be missing.
fn area_line(line: &str) -> Option<Area> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let (perms, rest) = rest.trim_ascii_start().split_at_checked(4)?;
    let &[read, write, exec, sharing] = perms.as_bytes() else { return None };
    let letter = |found, expected| match found {
        b'-' => Some(false),
        found => (found == expected).then_some(true),
    };
    let prot = Prot { read: letter(read, b'r')?, write: letter(write, b'w')?, exec: letter(exec, b'x')? };
    let sharing = match sharing {
        b'p' => Sharing::Private,
        b's' => Sharing::Shared,
        _ => return None,
    };
    let mut path = rest.trim_ascii();
    let fields: [fn(&str) -> bool; 3] = [
        |word| word.bytes().all(|byte| byte.is_ascii_hexdigit()),
        |word| word.len() >= 5 && word.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':'),
        |word| word.bytes().all(|byte| byte.is_ascii_digit()),
    ];
    for is_field in fields {
        let (word, after) = path.split_once(' ').unwrap_or((path, ""));
        if !word.is_empty() && is_field(word) {
            path = after.trim_ascii_start();
        }
    }
    Some(Area {
        line: 0,
        start: address(start)?,
        end: address(end)?,
        prot,
        sharing,
        path: path.to_owned(),
        resident: None,
        anonymous: 0,
        swapped: 0,
        hugetlb: 0,
        huge_leaves: 0,
        dirty: None,
        referenced: None,
        is_pfn: false,
        is_hugetlb: false,
    })
}

fn address(digits: &str) -> Option<u64> {
    let is_hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hexadecimal.then(|| u64::from_str_radix(digits, 16).ok())?
}

/// `NAME: VALUE`, where NAME is one word.
fn field(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.split_once(':')?;
    let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'(' | b')'));
    let is_value = value.ends_with(" kB") || matches!(name, "VmFlags" | "THPeligible" | "ProtectionKey");
    (is_name && !name.is_empty() && is_value).then_some((name, value.trim_ascii()))
}

impl Area {
    fn check(&self, previous_end: u64) -> Result<(), LayoutProblem> {
        for address in [self.start, self.end] {
            if !address.is_multiple_of(PAGE_BYTES) {
                return Err(LayoutProblem::Unaligned { address });
            }
            if address > USER_END {
                return Err(LayoutProblem::NotUser { address });
            }
        }
        if self.start >= self.end {
            return Err(LayoutProblem::EmptyVma { start: self.start, end: self.end });
        }
        if self.start < previous_end {
            return Err(LayoutProblem::VmaOrder { start: self.start, previous_end });
        }
        Ok(())
    }

    fn field(&mut self, (name, value): (&str, &str)) -> Result<(), LayoutProblem> {
        if name == "VmFlags" {
            for flag in value.split(' ') {
                self.is_pfn |= matches!(flag, "pf" | "io");
                self.is_hugetlb |= flag == "ht";
            }
            return Ok(());
        }
        let Some(kib) = value.strip_suffix("kB") else { return Ok(()) };
        let kib = kib.trim_ascii();
        let bytes = kib.parse::<u64>().ok().filter(|_| kib.bytes().all(|byte| byte.is_ascii_digit()));
        let bytes = bytes.and_then(|kib| kib.checked_mul(1024));
        let expected = "a number of kB";
        let bytes = bytes.ok_or_else(|| LayoutProblem::Expected { expected, found: value.to_owned() })?;
        let (pages, nr_vma_pages) = (bytes / PAGE_BYTES, (self.end - self.start) / PAGE_BYTES);
        match name {
            "Rss" => self.resident = Some(pages),
            "Anonymous" => self.anonymous = pages,
            "Swap" => self.swapped = pages,
            "Private_Hugetlb" | "Shared_Hugetlb" => self.hugetlb += pages,
            "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => self.huge_leaves += pages / HUGE_PAGES,
            "Private_Dirty" | "Shared_Dirty" => {
                self.dirty = Some(self.dirty.unwrap_or(0).saturating_add(pages))
            }
            "Referenced" => self.referenced = Some(pages),
            _ => return Ok(()),
        }
        if pages > nr_vma_pages || self.dirty > Some(nr_vma_pages) || self.hugetlb > nr_vma_pages {
            return Err(LayoutProblem::LeavesVma { found: pages.to_string(), nr_vma_pages });
        }
        Ok(())
    }

    fn kind(&self) -> VmaKind {
        let path = self.path.as_str();
        let name = || file_name(path.as_ref());
        let is_device = path.starts_with("/dev/")
            && !is_in_memory_only(path.as_ref())
            && !path.starts_with("/dev/hugepages/");
        match path {
            "[heap]" => VmaKind::Heap,
            "[stack]" => VmaKind::Stack,
            "[vdso]" => VmaKind::Pfn("vdso".to_owned()),
            path if path.starts_with("[vvar") => VmaKind::Pfn("vvar".to_owned()),
            _ if self.is_pfn || is_device => VmaKind::Pfn(name()),
            _ if self.is_hugetlb || path.starts_with("/anon_hugepage") => VmaKind::HugeTlb(name()),
            path if path.starts_with("/SYSV") => VmaKind::Shared("SYSV".to_owned()),
            path if path.starts_with('/') && is_in_memory_only(path.as_ref()) => VmaKind::Shared(name()),
            path if !path.is_empty() && !path.starts_with('[') => VmaKind::File(name()),
            _ if self.sharing == Sharing::Shared => VmaKind::Shared(String::new()),
            _ => VmaKind::Anon,
        }
    }

    fn vma(self) -> Result<LayoutVma, LayoutProblem> {
        let kind = self.kind();
        let nr_vma_pages = (self.end - self.start) / PAGE_BYTES;
        let can_use = self.prot.read || self.prot.write || self.prot.exec;
        let (mut huge, mut pages) = (Vec::new(), Vec::new());
        match (&kind, self.resident) {
            (VmaKind::HugeTlb(_), _) if self.hugetlb > 0 => {
                huge.push((PageState::FileHuge, self.hugetlb / HUGE_PAGES));
                pages.push((PageState::File, self.hugetlb % HUGE_PAGES));
            }
            (VmaKind::Pfn(_), resident) => {
                let assumed = if can_use { nr_vma_pages.min(ASSUMED_PAGES) } else { 0 };
                pages.push((PageState::Pfn, resident.unwrap_or(assumed)));
            }
            (kind, Some(resident)) => {
                let has_file = !matches!(kind, VmaKind::Anon | VmaKind::Heap | VmaKind::Stack);
                let anonymous = if has_file { self.anonymous.min(resident) } else { resident };
                let large =
                    if has_file && anonymous == 0 { PageState::FileHuge } else { PageState::AnonHuge };
                let (small, in_large) = match large {
                    PageState::FileHuge => (PageState::File, self.huge_leaves.min(resident / HUGE_PAGES)),
                    _ => (PageState::Anon, self.huge_leaves.min(anonymous / HUGE_PAGES)),
                };
                huge.push((large, in_large));
                let mut counts = [(PageState::File, resident - anonymous), (PageState::Anon, anonymous)];
                for (state, count) in &mut counts {
                    *count -= if *state == small { in_large * HUGE_PAGES } else { 0 };
                }
                pages.extend(counts);
                pages.push((PageState::Swap, self.swapped));
            }
            (kind, None) if can_use => {
                let is_anonymous = matches!(kind, VmaKind::Anon | VmaKind::Heap | VmaKind::Stack);
                let state = if is_anonymous { PageState::Anon } else { PageState::File };
                pages.push((state, nr_vma_pages.min(ASSUMED_PAGES)));
            }
            (_, None) => {}
        }
        let runs = place(self.start, nr_vma_pages, &huge, &pages);
        let placed: u64 = runs.iter().map(|run| run.nr_pages).sum();
        let asked =
            huge.iter().map(|(_, leaves)| leaves * HUGE_PAGES).chain(pages.iter().map(|(_, pages)| *pages));
        let asked: u64 = asked.sum();
        if placed < asked {
            return Err(LayoutProblem::LeavesVma { found: asked.to_string(), nr_vma_pages });
        }
        let Self { start, end, prot, sharing, dirty: nr_dirty, referenced: nr_referenced, .. } = self;
        Ok(LayoutVma { start, end, prot, sharing, kind, nr_dirty, nr_referenced, runs })
    }
}

/// Places large pages where the first of them can be, and the others in the first places left.
/// Large ones that find no place become small ones.
fn place(
    start: u64,
    nr_vma_pages: u64,
    huge: &[(PageState, u64)],
    pages: &[(PageState, u64)],
) -> Vec<PageRun> {
    let first_block = (start / PAGE_BYTES).next_multiple_of(HUGE_PAGES) - start / PAGE_BYTES;
    let room = nr_vma_pages.saturating_sub(first_block) / HUGE_PAGES;
    let (state, asked) = huge.first().copied().unwrap_or((PageState::AnonHuge, 0));
    let nr_huge = asked.min(room);
    let small = if state == PageState::FileHuge { PageState::File } else { PageState::Anon };
    let mut runs = Vec::new();
    let mut next = 0;
    let block = first_block..first_block + nr_huge * HUGE_PAGES;
    let mut push = |run: PageRun| {
        if run.nr_pages > 0 {
            runs.push(run);
        }
    };
    let left = (small, (asked - nr_huge) * HUGE_PAGES);
    for &(state, mut count) in core::iter::once(&left).chain(pages) {
        while count > 0 && next < nr_vma_pages {
            if next == block.start && !block.is_empty() {
                next = block.end;
                continue;
            }
            let end = if next < block.start && !block.is_empty() { block.start } else { nr_vma_pages };
            let nr_pages = count.min(end - next);
            push(PageRun { first_page: next, nr_pages, state });
            next += nr_pages;
            count -= nr_pages;
        }
    }
    push(PageRun { first_page: block.start, nr_pages: block.end - block.start, state });
    runs.sort_by_key(|run| run.first_page);
    runs
}

/// Tables below the root that the runs need.
fn tables_needed(layout: &Layout) -> u64 {
    let mut nr_tables = 0;
    for (shift, is_last) in [(21, true), (30, false), (39, false)] {
        let mut next = 0;
        for vma in &layout.vmas {
            for run in vma.runs.iter().filter(|run| !(is_last && run.state.is_huge())) {
                let start = vma.address_of(run);
                let (first, last) = (start >> shift, (start + run.nr_pages * PAGE_BYTES - 1) >> shift);
                nr_tables += (last + 1).saturating_sub(first.max(next));
                next = next.max(last + 1);
            }
        }
    }
    nr_tables
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ReadLayout {
        parse_maps("x.maps", "x", text).unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    fn error(text: &str) -> String {
        parse_maps("x.maps", "x", text).expect_err(text).to_string()
    }

    const MAPS: &str = "\
55d000000000-55d000002000 r-xp 00001000 fd:00 1234                       /usr/bin/a b (deleted)
55d000003000-55d000004000 rw-p 00000000 00:00 0
55d000100000-55d000200000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 ---p 00000000 00:00 0
7f0000400000-7f0002400000 rw-p 00000000 00:00 0                          [anon:x]
7f0002400000-7f0002401000 rw-s 00000000 00:05 7                          /dev/shm/y
7f0002401000-7f0002402000 rw-s 00000000 00:05 7                          /memfd:z (deleted)
7f0002402000-7f0002403000 rw-s 00000000 00:01 9                          /SYSV00000000 (deleted)
7f0002403000-7f0002404000 rw-s 00000000 00:06 9                          /dev/dri/card0
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
7ffc00030000-7ffc00034000 r--p 00000000 00:00 0                          [vvar_vclock]
7ffc00034000-7ffc00036000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn areas_have_their_kinds_and_what_is_there_is_assumed() {
        let ReadLayout { layout, remarks } = parse(MAPS);
        let file = |name: &str| VmaKind::File(name.to_owned());
        let shared = |name: &str| VmaKind::Shared(name.to_owned());
        let pfn = |name: &str| VmaKind::Pfn(name.to_owned());
        let expected = [
            (file("a b"), 2),
            (VmaKind::Anon, 1),
            (VmaKind::Heap, 256),
            (VmaKind::Anon, 0),
            (VmaKind::Anon, ASSUMED_PAGES),
            (shared("y"), 1),
            (shared("memfd:z"), 1),
            (shared("SYSV"), 1),
            (pfn("card0"), 1),
            (VmaKind::Stack, 33),
            (pfn("vvar"), 4),
            (pfn("vdso"), 2),
        ];
        let pages = |vma: &LayoutVma| vma.runs.iter().map(|run| run.nr_pages).sum::<u64>();
        let found: Vec<_> = layout.vmas.iter().map(|vma| (vma.kind.clone(), pages(vma))).collect();
        assert_eq!(found, expected);
        assert_eq!(layout.vmas[0].prot, Prot { read: true, write: false, exec: true });
        let [remark] = remarks.as_slice() else { panic!("{remarks:?}") };
        assert!(remark.contains("was assumed: of 12 areas the first 16 MiB"), "{remark}");
    }

    #[test]
    fn pasting_changes_nothing() {
        let plain = parse(MAPS);
        for text in [
            MAPS.replace('\n', "\r\n"),
            MAPS.replace('\n', "   \n"),
            MAPS.lines().map(|line| format!("> > {line}\n")).collect(),
            MAPS.lines().map(|line| format!("    {line}\n\n")).collect(),
            MAPS.replace(' ', "\u{a0}"),
            MAPS.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" "),
            format!("...\n{MAPS}"),
            MAPS.trim_end().to_owned(),
        ] {
            assert_eq!(parse(&text), plain, "{text}");
        }
        let read = parse(&format!("$ cat /proc/7/maps\n{MAPS}$\n"));
        assert_eq!(read.layout, plain.layout);
        assert!(read.remarks[1].contains("x.maps:1: 2 lines skipped"), "{:?}", read.remarks);
        assert!(!is_maps("hello\n12-34 world\n") && is_maps(&format!("> hello\n> {MAPS}")));
    }

    /// One area of smaps.
    fn smaps(range: &str, path: &str, fields: &[(&str, u64)], flags: &str) -> String {
        let fields: String = fields.iter().map(|(name, kib)| format!("{name}:  {kib:>8} kB\n")).collect();
        format!("{range} rw-p 00000000 00:00 0   {path}\n{fields}THPeligible:    1\nVmFlags: {flags}\n")
    }

    fn runs(text: &str) -> Vec<(u64, u64, PageState)> {
        let read = parse(text);
        assert!(read.remarks.iter().all(|remark| !remark.contains("skipped")), "{:?}", read.remarks);
        let runs = read.layout.vmas.iter().flat_map(|vma| &vma.runs);
        runs.map(|run| (run.first_page, run.nr_pages, run.state)).collect()
    }

    #[test]
    fn smaps_says_how_many_pages_of_which_kind_are_there() {
        use PageState::{Anon, AnonHuge, File, FileHuge, Pfn, Swap};
        let area = "7f0000100000-7f0000800000";
        let fields = [("Rss", 6148), ("Anonymous", 6148), ("AnonHugePages", 4096), ("Swap", 8)];
        // 2 MiB leaves stand where such leaves can.
        let expected = [(0, 256, Anon), (256, 1024, AnonHuge), (1280, 257, Anon), (1537, 2, Swap)];
        assert_eq!(runs(&smaps(area, "", &fields, "rd wr")), expected);
        let fields = [("Rss", 20), ("Anonymous", 8), ("Swap", 4)];
        assert_eq!(runs(&smaps(area, "/a", &fields, "rd")), [(0, 3, File), (3, 2, Anon), (5, 1, Swap)]);
        let fields = [("Rss", 2052), ("Anonymous", 0), ("FilePmdMapped", 2048)];
        assert_eq!(runs(&smaps(area, "/a", &fields, "rd")), [(0, 1, File), (256, 512, FileHuge)]);
        let fields = [("Rss", 0), ("Private_Hugetlb", 4096)];
        let area = "7f0000200000-7f0000800000";
        assert_eq!(runs(&smaps(area, "/anon_hugepage (deleted)", &fields, "ht")), [(0, 1024, FileHuge)]);
        assert_eq!(runs(&smaps(area, "/dev/x", &[("Rss", 8)], "pf io")), [(0, 2, Pfn)]);
        assert_eq!(runs(&smaps(area, "", &[("Rss", 0)], "")), []);
        // More large pages than places for them.
        let area = "7f0000100000-7f0000300000";
        let fields = [("Rss", 2048), ("Anonymous", 2048), ("AnonHugePages", 2048)];
        assert_eq!(runs(&smaps(area, "", &fields, "")), [(0, 512, Anon)]);
        let text = smaps(area, "", &[("Rss", 4), ("Private_Dirty", 4), ("Referenced", 4)], "rd");
        let vma = &parse(&text).layout.vmas[0];
        assert_eq!((vma.nr_dirty, vma.nr_referenced), (Some(1), Some(1)));
        assert_eq!(parse(&text).layout.nr_tables, 3);
    }

    #[test]
    fn what_no_process_can_have_is_named_with_its_line() {
        let good = "7f0000000000-7f0000001000 rw-p 00000000 00:00 0\n";
        for (text, expected) in [
            (format!("{good}{good}"), "x.maps:2: expected an area at or above 0x7f0000001000"),
            (format!("{good}7f0000001000-7f0000001000 rw-p 0 00:00 0\n"), "x.maps:2: expected an end above"),
            (
                format!("{good}7f0000001000-7f0000001800 rw-p 0 00:00 0\n"),
                "x.maps:2: expected a multiple of 4096",
            ),
            (
                format!("{good}aaaac0000000-aaaac0001000 rw-p 0 00:00 0\n"),
                "x.maps:2: expected a user address",
            ),
            (format!("{good}Rss:   8 kB\n"), "x.maps:2: expected at most 1 page"),
            (format!("{good}Rss:   x kB\n"), "x.maps:2: expected a number of kB"),
            (
                format!("{good}Rss:   4 kB\nSwap:   4 kB\n"),
                "x.maps:1: expected at most 1 page in this area, found 2",
            ),
            (format!("{good}Rss: 99999999999999999999 kB\n"), "x.maps:2: expected a number of kB"),
            ("hello\n".to_owned(), "x.maps:1: expected an area of a process"),
            (
                format!("{good}7e0000000000-7ec000000000 rw-p 0 00:00 0\nRss: 536870912 kB\n")
                    .replace("7f0000000000-7f0000001000", "1000-2000"),
                "x.maps:2: expected at most 33554432 pages in all (128 GiB)",
            ),
        ] {
            assert!(error(&text).contains(expected), "{text}: {}", error(&text));
        }
    }

    #[test]
    fn the_areas_of_this_process_are_read() {
        for file in ["maps", "smaps"] {
            let bytes = std::fs::read(format!("/proc/self/{file}")).expect("own process");
            let read = parse(&String::from_utf8_lossy(&bytes));
            assert!(read.layout.vmas.len() > 10 && read.layout.totals().nr_present() > 100, "{file}");
            assert!(read.remarks.iter().all(|remark| !remark.contains("skipped")), "{:?}", read.remarks);
        }
    }
}
