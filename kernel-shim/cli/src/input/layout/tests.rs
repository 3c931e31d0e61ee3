//! The layout format against every bundled layout, against damaged ones, and against made-up ones.

use proptest::prelude::*;

use crate::input::bundled::LAYOUTS;
use crate::input::layout::{
    HUGE_PAGES, Layout, LayoutProblem, LayoutVma, MOST_PAGES, PAGE_BYTES, PageRun, Prot, Sharing, USER_END,
    VmaKind,
};

/// File name and text of each bundled layout.
fn bundled() -> Vec<(String, &'static str)> {
    LAYOUTS.iter().map(|bundled| (format!("{}.layout", bundled.name), bundled.text)).collect()
}

fn parsed() -> impl Iterator<Item = Layout> {
    bundled()
        .into_iter()
        .map(|(name, text)| Layout::parse(&name, text).unwrap_or_else(|error| panic!("{error}")))
}

#[test]
fn every_bundled_layout_round_trips_byte_for_byte() {
    let files = bundled();
    assert!(files.len() >= 10, "only {} bundled layouts", files.len());
    for (name, text) in files {
        let layout = Layout::parse(&name, text).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(format!("{}.layout", layout.name), name);
        assert!(layout.to_string() == text, "{name} is written otherwise than it was read");
    }
}

#[test]
fn the_bundled_layouts_reach_over_four_gigabytes_and_hold_every_common_state() {
    let totals = parsed().map(|layout| layout.totals()).collect::<Vec<_>>();
    assert!(totals.iter().any(|totals| totals.nr_resident() * PAGE_BYTES > 4 << 30));
    assert!(totals.iter().any(|totals| totals.nr_huge > 0));
    assert!(totals.iter().any(|totals| totals.nr_swap > 0));
    assert!(totals.iter().any(|totals| totals.nr_zero > 0));
}

#[test]
fn no_bundled_layout_needs_more_tables_than_its_kernel_counted() {
    for layout in parsed() {
        let mut needed = 0;
        // 4 KiB leaves need a table for each 2 MiB; any leaf one for each 1 GiB and 512 GiB.
        for (bytes_log2, includes_huge) in [(21, false), (30, true), (39, true)] {
            let mut last = None;
            for (vma, run) in layout.vmas.iter().flat_map(|vma| vma.runs.iter().map(move |run| (vma, run))) {
                if run.state.is_huge() && !includes_huge {
                    continue;
                }
                let first_byte = vma.address_of(run);
                let (from, to) =
                    (first_byte >> bytes_log2, (first_byte + run.nr_pages * PAGE_BYTES - 1) >> bytes_log2);
                needed += to - from + u64::from(last != Some(from));
                last = Some(to);
            }
        }
        assert!(needed <= layout.nr_tables, "{}: {needed} > {}", layout.name, layout.nr_tables);
    }
}

/// A small layout of which each test breaks one line.
const GOOD: &str = "\
mmu-gather layout 1
name \"x\"
command \"x \\\"y\\\" \\u{a}\"
kernel \"Linux 1.2.3\"
threads 1
tables 5

# a comment
vma 400000-800000 r-xp file \"x y\" dirty=0
  file 0+2 5 file-huge 512+512
vma 7f0000000000-7f0000400000 rw-p anon
  anon 1 anon-huge 512+512
end vmas=2 runs=5 pages=1028
";

#[test]
fn comments_blank_lines_and_escapes_are_read() {
    let layout = Layout::parse("good", GOOD).expect("a good layout");
    assert_eq!(layout.command, "x \"y\" \n");
    assert_eq!(layout.vmas[0].kind, VmaKind::File("x y".to_owned()));
    assert_eq!((layout.vmas[0].nr_dirty, layout.vmas[0].nr_referenced), (Some(0), None));
    assert_eq!(layout.totals().nr_present(), 1028);
}

#[test]
fn each_mistake_is_named_with_its_line() {
    for (from, to, message) in [
        ("layout 1", "layout 2", "1: expected `mmu-gather layout 1`, found `mmu-gather layout 2`"),
        ("name \"x\"", "nam \"x\"", "2: expected `name`, found `nam \"x\"`"),
        ("name \"x\"", "name x", "2: expected a name in double quotes, found `x`"),
        ("name \"x\"", "name \"x", "2: expected a closing quote, found `\"x`"),
        ("\\u{a}", "\\n", "3: expected an escape: `\\\"`, `\\\\` or `\\u{HEX}`, found `\"x \\\"y\\\" \\n\"`"),
        ("threads 1", "threads +1", "5: expected a decimal number below 2^64, found `+1`"),
        (
            "tables 5",
            "tables 99999999999999999999",
            "6: expected a decimal number below 2^64, found `99999999999999999999`",
        ),
        (
            "vma 400000",
            "vmb 400000",
            "9: expected `vma` or `end`, found `vmb 400000-800000 r-xp file \"x y\" dirty=0`",
        ),
        ("400000-", "400001-", "9: expected a multiple of 4096, found address 0x400001"),
        ("400000-800000", "800000-400000", "9: expected an end above the start 0x800000, found 0x400000"),
        (
            "7f0000400000",
            "800000000000",
            "11: expected a user address, found 0x800000000000, which is not canonical",
        ),
        (
            "7f0000400000",
            "7ffffffff000000000",
            "11: expected an area as `START-END` in hexadecimal, found `7f0000000000-7ffffffff000000000 rw-p anon`",
        ),
        (
            "7f0000400000",
            "ffffffffff600000",
            "11: expected a user address below 0x7ffffffff000, found 0xffffffffff600000 of the kernel",
        ),
        (
            "7f0000000000",
            "7ff000",
            "11: expected an area at or above 0x800000, where the one before ends, found 0x7ff000",
        ),
        ("rw-p", "rwp", "11: expected permissions such as `rw-p`, found `rwp anon`"),
        (
            "rw-p anon",
            "rw-p",
            "11: expected `anon`, `heap`, `stack`, `file`, `shared`, `hugetlb` or `pfn`, found the end of the line",
        ),
        ("dirty=0", "dirty=1025", "9: expected at most 1024 pages in this area, found 1025"),
        ("dirty=0", "dirt=0", "9: expected the end of the line, found `dirt=0`"),
        (
            "  anon 1",
            "  anom 1",
            "12: expected `vma`, `end`, or a page state such as `anon`, found `anom 1 anon-huge 512+512`",
        ),
        (
            "anon 1 ",
            "anon 1+0 ",
            "12: expected a page state, or a run of pages such as `7` or `12+3`, found `1+0 anon-huge 512+512`",
        ),
        (
            "anon-huge 512+512",
            "anon-huge",
            "12: expected a run of pages such as `7` or `12+3`, found the end of the line",
        ),
        ("anon 1 ", "anon 1024 ", "12: expected at most 1024 pages in this area, found 1024"),
        (
            "anon 1 ",
            "anon 1+18446744073709551615 ",
            "12: expected at most 1024 pages in this area, found 1+18446744073709551615",
        ),
        ("0+2 5", "0+2 1", "10: expected a run at or after page 2, where the one before ends, found page 1"),
        (
            "anon-huge 512+512",
            "anon-huge 511+512",
            "12: expected whole 2 MiB leaves, found 512 pages at 0x7f00001ff000",
        ),
        (
            "anon-huge 512+512",
            "anon-huge 512+511",
            "12: expected whole 2 MiB leaves, found 511 pages at 0x7f0000200000",
        ),
        ("pages=1028", "pages=1027", "13: the end line states 1027 pages, the file has 1028"),
        ("vmas=2", "vmas=3", "13: the end line states 3 vmas, the file has 2"),
        ("end vmas", "end\nvmas", "13: expected `vmas=` and a count, found the end of the line"),
        ("pages=1028\n", "pages=1028\nanon 1\n", "14: expected nothing after the `end` line, found `anon 1`"),
        (
            "end vmas=2 runs=5 pages=1028\n",
            "",
            "12: the file is cut off: expected an `end` line before its end",
        ),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let error = Layout::parse("bad", &GOOD.replacen(from, to, 1)).expect_err(to);
        assert_eq!(error.to_string(), format!("bad:{message}"));
    }
    let error = Layout::parse("empty", "").expect_err("nothing");
    assert_eq!(
        error.to_string(),
        "empty:1: the file is cut off: expected `mmu-gather layout 1` before its end"
    );
}

#[test]
fn long_garbage_is_not_repeated_in_full() {
    let error = Layout::parse("bad", &"é".repeat(5000)).expect_err("garbage");
    assert!(error.to_string().len() < 250, "{error}");
}

/// One way to damage a text.
#[derive(Debug, Clone)]
enum Damage {
    DeleteLine(prop::sample::Index),
    RepeatLine(prop::sample::Index),
    SwapLines(prop::sample::Index, prop::sample::Index),
    ReplaceByte(prop::sample::Index, u8),
    InsertWord(prop::sample::Index, &'static str),
}

fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    let word = prop::sample::select(vec![
        "18446744073709551615",
        "+",
        "-",
        "0",
        " vma ",
        "\"",
        "\\",
        "\n",
        "huge",
        " anon 1 ",
        "7fffffffffff",
        "=",
        "é",
    ]);
    prop_oneof![
        index().prop_map(Damage::DeleteLine),
        index().prop_map(Damage::RepeatLine),
        (index(), index()).prop_map(|(one, other)| Damage::SwapLines(one, other)),
        (index(), b' '..b'~').prop_map(|(at, byte)| Damage::ReplaceByte(at, byte)),
        (index(), word).prop_map(|(at, word)| Damage::InsertWord(at, word)),
    ]
}

impl Damage {
    /// Every bundled layout is ASCII, so that a byte is a character until a word is inserted.
    fn apply(&self, text: &str) -> String {
        let mut lines = text.lines().map(str::to_owned).collect::<Vec<_>>();
        let nr_lines = lines.len();
        match self {
            Self::DeleteLine(at) => drop(lines.remove(at.index(nr_lines))),
            Self::RepeatLine(at) => lines.insert(at.index(nr_lines), lines[at.index(nr_lines)].clone()),
            Self::SwapLines(one, other) => lines.swap(one.index(nr_lines), other.index(nr_lines)),
            Self::ReplaceByte(at, byte) => {
                let mut bytes = text.as_bytes().to_vec();
                bytes[at.index(text.len())] = *byte;
                return String::from_utf8_lossy(&bytes).into_owned();
            }
            Self::InsertWord(at, word) => {
                let at = text.floor_char_boundary(at.index(text.len()));
                return [&text[..at], *word, &text[at..]].concat();
            }
        }
        lines.join("\n")
    }
}

fn vma(start: u64, kind: VmaKind) -> impl Strategy<Value = LayoutVma> {
    let run = (0..1500_u64, 1..1500_u64, prop::sample::select(kind.states().to_vec()));
    (prop::collection::vec(run, 0..12), any::<[bool; 4]>(), any::<[Option<u8>; 2]>()).prop_map(
        move |(steps, [read, write, exec, shared], [dirty, referenced])| {
            let mut runs = Vec::new();
            let mut page = 0;
            for (gap, nr_pages, state) in steps {
                let huge = state.is_huge();
                let first_page = if huge { (page + gap).next_multiple_of(HUGE_PAGES) } else { page + gap };
                let nr_pages = if huge { nr_pages.next_multiple_of(HUGE_PAGES) } else { nr_pages };
                runs.push(PageRun { first_page, nr_pages, state });
                page = first_page + nr_pages;
            }
            let nr_pages = page.max(1);
            LayoutVma {
                start,
                end: start + nr_pages * PAGE_BYTES,
                prot: Prot { read, write, exec },
                sharing: if shared { Sharing::Shared } else { Sharing::Private },
                kind: kind.clone(),
                nr_dirty: dirty.map(|dirty| u64::from(dirty).min(nr_pages)),
                nr_referenced: referenced.map(|referenced| u64::from(referenced).min(nr_pages)),
                runs,
            }
        },
    )
}

fn layout() -> impl Strategy<Value = Layout> {
    (any::<String>(), any::<String>(), any::<String>(), any::<[u64; 2]>()).prop_flat_map(
        |(name, command, file, counts)| {
            let vmas = (
                vma(0, VmaKind::Anon),
                vma(1 << 40, VmaKind::File(file.clone())),
                vma(2 << 40, VmaKind::Shared(file.clone())),
                vma(3 << 40, VmaKind::HugeTlb(file.clone())),
                vma(4 << 40, VmaKind::Pfn(file)),
                vma(5 << 40, VmaKind::Stack),
            );
            vmas.prop_map(move |(a, b, c, d, e, f)| Layout {
                name: name.clone(),
                command: command.clone(),
                kernel: String::new(),
                nr_threads: counts[0],
                nr_tables: counts[1],
                vmas: vec![a, b, c, d, e, f],
            })
        },
    )
}

proptest! {
    #[test]
    fn damaged_layouts_never_panic_and_accepted_ones_keep_every_promise(
        which in any::<prop::sample::Index>(),
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let files = bundled();
        let mut text = files[which.index(files.len())].1.to_owned();
        for damage in damages {
            text = damage.apply(&text);
        }
        if let Ok(layout) = Layout::parse("damaged", &text) {
            prop_assert_eq!(layout.check(), Ok(()));
            let mut last = 0;
            for vma in &layout.vmas {
                prop_assert!(last <= vma.start && vma.start < vma.end && vma.end <= USER_END);
                last = vma.end;
            }
        }
    }

    #[test]
    fn a_cut_off_layout_is_refused(which in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>()) {
        let files = bundled();
        let text = files[which.index(files.len())].1.trim_end();
        prop_assert!(Layout::parse("cut", &text[..cut.index(text.len())]).is_err());
    }

    #[test]
    fn any_text_is_answered(text in any::<String>()) {
        prop_assert!(Layout::parse("text", &text).is_err());
    }

    #[test]
    fn a_made_up_layout_reads_back_as_it_was_written(layout in layout()) {
        let text = layout.to_string();
        prop_assert_eq!(Layout::parse("made up", &text), Ok(layout));
    }
}

/// Once, a line of it took the memory of the host.
#[test]
fn a_layout_of_more_pages_than_a_machine_is_meant_for_is_refused_at_its_line() {
    let layout = |pages: u64| {
        format!(
            "mmu-gather layout 1\nname \"x\"\ncommand \"x\"\nkernel \"x\"\nthreads 1\ntables 1\n\
             vma 100000000000-200000000000 rw-p anon\n anon 0+{MOST_PAGES}\n anon {MOST_PAGES}+{pages}\n\
             end vmas=1 runs=2 pages={}\n",
            MOST_PAGES + pages
        )
    };
    let error = Layout::parse("x", &layout(1)).expect_err("one page too many");
    assert_eq!((error.line, error.problem), (9, LayoutProblem::TooManyPages));
    let fits = layout(1).replace(&format!(" anon {MOST_PAGES}+1\n"), "").replace("runs=2", "runs=1");
    assert!(
        Layout::parse("x", &fits.replace(&(MOST_PAGES + 1).to_string(), &MOST_PAGES.to_string())).is_ok()
    );
}
