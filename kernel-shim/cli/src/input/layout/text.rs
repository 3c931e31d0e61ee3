//! The text form of a [`Layout`], described in `tests/layouts/README.md`: reading it line by line,
//! writing it back.

use core::fmt;
use core::str::Lines;

use crate::input::layout::error::{LayoutError, LayoutProblem};
use crate::input::layout::snapshot::{
    HUGE_PAGES, Layout, LayoutVma, MOST_PAGES, PAGE_BYTES, PageRun, PageState, Prot, Sharing, USER_END,
    VmaKind,
};

/// First line of every file. A later format gets a later number.
const HEADER: &str = "mmu-gather layout 1";

/// Where a line of runs is broken, in characters.
const LINE_CHARS: usize = 110;

impl Layout {
    /// Reads the text form; `source` is the name errors carry, usually the file's.
    ///
    /// # Errors
    ///
    /// Whatever the text does wrong, as one [`LayoutError`] that names the source, the line and
    /// what was expected.
    pub fn parse(source: &str, text: &str) -> Result<Self, LayoutError> {
        let mut parser = Parser { lines: text.lines(), line: 0 };
        parser.layout().map_err(|problem| LayoutError {
            source_name: source.to_owned(),
            line: parser.line.max(1),
            problem,
        })
    }

    /// Writes the text form, which [`Layout::parse`] reads back unchanged.
    ///
    /// # Errors
    ///
    /// Only what `writer` returns.
    pub fn write_to(&self, mut writer: impl std::io::Write) -> std::io::Result<()> {
        write!(writer, "{self}")
    }

    /// Repeats the checks of [`Layout::parse`] on a layout built by hand.
    ///
    /// # Errors
    ///
    /// The first broken promise of the module documentation; the line in it is the one the text
    /// form would have.
    pub fn check(&self) -> Result<(), LayoutError> {
        Self::parse(&self.name, &self.to_string()).map(drop)
    }
}

impl fmt::Display for Layout {
    /// The text form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}")?;
        writeln!(f, "name {}", Quoted(&self.name))?;
        writeln!(f, "command {}", Quoted(&self.command))?;
        writeln!(f, "kernel {}", Quoted(&self.kernel))?;
        writeln!(f, "threads {}", self.nr_threads)?;
        writeln!(f, "tables {}", self.nr_tables)?;
        for vma in &self.vmas {
            write_vma(vma, f)?;
        }
        writeln!(f, "end {}", Trailer::from_layout(self))
    }
}

fn write_vma(vma: &LayoutVma, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let sharing = match vma.sharing {
        Sharing::Private => "p",
        Sharing::Shared => "s",
    };
    write!(f, "vma {:x}-{:x} {}{sharing} ", vma.start, vma.end, vma.prot)?;
    match &vma.kind {
        VmaKind::Anon => write!(f, "anon")?,
        VmaKind::Heap => write!(f, "heap")?,
        VmaKind::Stack => write!(f, "stack")?,
        VmaKind::File(name) => write!(f, "file {}", Quoted(name))?,
        VmaKind::Shared(name) => write!(f, "shared {}", Quoted(name))?,
        VmaKind::HugeTlb(name) => write!(f, "hugetlb {}", Quoted(name))?,
        VmaKind::Pfn(name) => write!(f, "pfn {}", Quoted(name))?,
    }
    if let Some(nr_dirty) = vma.nr_dirty {
        write!(f, " dirty={nr_dirty}")?;
    }
    if let Some(nr_referenced) = vma.nr_referenced {
        write!(f, " referenced={nr_referenced}")?;
    }
    writeln!(f)?;

    let mut line = String::new();
    let mut state_of_line = None;
    for run in &vma.runs {
        let pages = match run.nr_pages {
            1 => format!(" {}", run.first_page),
            nr_pages => format!(" {}+{nr_pages}", run.first_page),
        };
        let state = run.state.word();
        if !line.is_empty() && line.len() + 1 + state.len() + pages.len() >= LINE_CHARS {
            writeln!(f, " {line}")?;
            line.clear();
            state_of_line = None;
        }
        if state_of_line.replace(run.state) != Some(run.state) {
            line = line + " " + state;
        }
        line += &pages;
    }
    if line.is_empty() { Ok(()) } else { writeln!(f, " {line}") }
}

/// The counts of the last line.
#[derive(PartialEq, Eq)]
struct Trailer {
    nr_vmas: u64,
    nr_runs: u64,
    nr_pages: u64,
}

impl Trailer {
    fn from_layout(layout: &Layout) -> Self {
        let mut trailer = Self { nr_vmas: 0, nr_runs: 0, nr_pages: 0 };
        for vma in &layout.vmas {
            trailer.nr_vmas += 1;
            for run in &vma.runs {
                trailer.nr_runs += 1;
                trailer.nr_pages = trailer.nr_pages.wrapping_add(run.nr_pages);
            }
        }
        trailer
    }
}

impl fmt::Display for Trailer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmas={} runs={} pages={}", self.nr_vmas, self.nr_runs, self.nr_pages)
    }
}

/// A string between quotes, with nothing in it that ends a line.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"")?;
        for char in self.0.chars() {
            match char {
                '"' | '\\' => write!(f, "\\{char}")?,
                char if char.is_control() => write!(f, "{}", char.escape_unicode())?,
                char => write!(f, "{char}")?,
            }
        }
        write!(f, "\"")
    }
}

/// The lines not yet read.
struct Parser<'a> {
    lines: Lines<'a>,
    line: usize,
}

impl<'a> Parser<'a> {
    fn layout(&mut self) -> Result<Layout, LayoutProblem> {
        let header = self.next("`mmu-gather layout 1`")?;
        if header.rest != HEADER {
            return Err(header.expected("`mmu-gather layout 1`"));
        }
        let mut layout = Layout {
            name: self.header("`name`", "name", Words::quoted)?,
            command: self.header("`command`", "command", Words::quoted)?,
            kernel: self.header("`kernel`", "kernel", Words::quoted)?,
            nr_threads: self.header("`threads`", "threads", Words::decimal)?,
            nr_tables: self.header("`tables`", "tables", Words::decimal)?,
            vmas: Vec::new(),
        };
        let mut nr_pages = 0_u64;
        loop {
            let mut words = self.next("an `end` line")?;
            if words.eat("vma") {
                let previous_end = layout.vmas.last().map_or(0, |vma| vma.end);
                layout.vmas.push(words.vma(previous_end)?);
            } else if words.eat("end") {
                let counted = Trailer::from_layout(&layout);
                words.trailer()?.check(&counted)?;
                return self.nothing_follows().map(|()| layout);
            } else if let Some(vma) = layout.vmas.last_mut() {
                let nr_runs = vma.runs.len();
                words.runs(vma)?;
                let new: u64 = vma.runs[nr_runs..].iter().map(|run| run.nr_pages).sum();
                nr_pages = nr_pages.saturating_add(new);
                if nr_pages > MOST_PAGES {
                    return Err(LayoutProblem::TooManyPages);
                }
            } else {
                return Err(words.expected("`vma` or `end`"));
            }
        }
    }

    /// The next line that is not blank or a comment.
    fn next(&mut self, expected: &'static str) -> Result<Words<'a>, LayoutProblem> {
        self.next_or_none().ok_or(LayoutProblem::CutOff { expected })
    }

    fn next_or_none(&mut self) -> Option<Words<'a>> {
        loop {
            let rest = self.lines.next()?.trim_ascii();
            self.line += 1;
            if !rest.is_empty() && !rest.starts_with('#') {
                return Some(Words { rest });
            }
        }
    }

    /// A line of one word and one value.
    fn header<T>(
        &mut self,
        expected: &'static str,
        word: &str,
        value: impl FnOnce(&mut Words<'a>) -> Result<T, LayoutProblem>,
    ) -> Result<T, LayoutProblem> {
        let mut words = self.next(expected)?;
        if !words.eat(word) {
            return Err(words.expected(expected));
        }
        let value = value(&mut words)?;
        words.end().map(|()| value)
    }

    fn nothing_follows(&mut self) -> Result<(), LayoutProblem> {
        self.next_or_none().map_or(Ok(()), |words| Err(words.expected("nothing after the `end` line")))
    }
}

impl Trailer {
    fn check(&self, counted: &Self) -> Result<(), LayoutProblem> {
        for (what, stated, counted) in [
            ("vmas", self.nr_vmas, counted.nr_vmas),
            ("runs", self.nr_runs, counted.nr_runs),
            ("pages", self.nr_pages, counted.nr_pages),
        ] {
            if stated != counted {
                return Err(LayoutProblem::Count { what, stated, counted });
            }
        }
        Ok(())
    }
}

/// The words of a line not yet read.
struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    /// `START-END PERMS KIND [dirty=N] [referenced=N]`, after `vma`.
    fn vma(&mut self, previous_end: u64) -> Result<LayoutVma, LayoutProblem> {
        const RANGE: &str = "an area as `START-END` in hexadecimal";
        let (start, end) = self.word_as(RANGE, |word| {
            let (start, end) = word.split_once('-')?;
            Some((hexadecimal(start)?, hexadecimal(end)?))
        })?;
        check_vma(start, end, previous_end)?;
        let (prot, sharing) = self.word_as("permissions such as `rw-p`", permissions)?;
        let kind = self.kind()?;
        let vma = LayoutVma {
            start,
            end,
            prot,
            sharing,
            kind,
            nr_dirty: self.attribute("dirty")?,
            nr_referenced: self.attribute("referenced")?,
            runs: Vec::new(),
        };
        self.end()?;
        let nr_vma_pages = vma.nr_pages();
        for count in [vma.nr_dirty, vma.nr_referenced].into_iter().flatten() {
            if count > nr_vma_pages {
                return Err(LayoutProblem::LeavesVma { found: count.to_string(), nr_vma_pages });
            }
        }
        Ok(vma)
    }

    fn kind(&mut self) -> Result<VmaKind, LayoutProblem> {
        const KIND: &str = "`anon`, `heap`, `stack`, `file`, `shared`, `hugetlb` or `pfn`";
        let before = self.rest;
        match self.word() {
            "anon" => Ok(VmaKind::Anon),
            "heap" => Ok(VmaKind::Heap),
            "stack" => Ok(VmaKind::Stack),
            "file" => self.quoted().map(VmaKind::File),
            "shared" => self.quoted().map(VmaKind::Shared),
            "hugetlb" => self.quoted().map(VmaKind::HugeTlb),
            "pfn" => self.quoted().map(VmaKind::Pfn),
            _ => Err(Words { rest: before }.expected(KIND)),
        }
    }

    /// ` NAME=N`, where it is there.
    fn attribute(&mut self, name: &str) -> Result<Option<u64>, LayoutProblem> {
        let Some(rest) = self.rest.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')) else {
            return Ok(None);
        };
        self.rest = rest;
        self.decimal().map(Some)
    }

    /// `STATE RUN RUN ... STATE RUN ...`, to the end of the line.
    fn runs(&mut self, vma: &mut LayoutVma) -> Result<(), LayoutProblem> {
        let mut state = None;
        // A state with no run is a line that lost its end.
        let mut owes_run = true;
        while !self.rest.is_empty() {
            let before = self.rest;
            let word = self.word();
            if let Some(named) = PageState::ALL.into_iter().find(|state| state.word() == word) {
                state = Some(named);
                owes_run = true;
                continue;
            }
            let here = Words { rest: before };
            let Some(state) = state else {
                return Err(here.expected("`vma`, `end`, or a page state such as `anon`"));
            };
            let Some((first_page, nr_pages)) = run(word) else {
                return Err(here.expected("a page state, or a run of pages such as `7` or `12+3`"));
            };
            let run = PageRun { first_page, nr_pages, state };
            check_run(&run, vma, word)?;
            vma.runs.push(run);
            owes_run = false;
        }
        if owes_run { Err(self.expected("a run of pages such as `7` or `12+3`")) } else { Ok(()) }
    }

    /// `vmas=N runs=N pages=N`, after `end`.
    fn trailer(&mut self) -> Result<Trailer, LayoutProblem> {
        let mut count = |name, expected| self.attribute(name)?.ok_or_else(|| self.expected(expected));
        let trailer = Trailer {
            nr_vmas: count("vmas", "`vmas=` and a count")?,
            nr_runs: count("runs", "`runs=` and a count")?,
            nr_pages: count("pages", "`pages=` and a count")?,
        };
        self.end().map(|()| trailer)
    }

    fn decimal(&mut self) -> Result<u64, LayoutProblem> {
        self.word_as("a decimal number below 2^64", decimal)
    }

    /// A string between quotes.
    fn quoted(&mut self) -> Result<String, LayoutProblem> {
        let before = self.rest;
        let mut chars = before.chars();
        let mut text = String::new();
        if chars.next() != Some('"') {
            return Err(self.expected("a name in double quotes"));
        }
        loop {
            match chars.next() {
                Some('"') if chars.as_str().is_empty() || chars.as_str().starts_with(' ') => {
                    self.rest = chars.as_str().trim_ascii_start();
                    return Ok(text);
                }
                Some('\\') => match unescape(&mut chars) {
                    Some(char) => text.push(char),
                    None => return Err(self.expected("an escape: `\\\"`, `\\\\` or `\\u{HEX}`")),
                },
                Some('"') => return Err(self.expected("a space after the closing quote")),
                Some(char) => text.push(char),
                None => return Err(self.expected("a closing quote")),
            }
        }
    }

    /// Takes the next word where it is this one.
    fn eat(&mut self, word: &str) -> bool {
        let mut ahead = Words { rest: self.rest };
        let found = ahead.word() == word;
        if found {
            self.rest = ahead.rest;
        }
        found
    }

    fn word(&mut self) -> &'a str {
        let (word, rest) = self.rest.split_at(self.rest.find(' ').unwrap_or(self.rest.len()));
        self.rest = rest.trim_ascii_start();
        word
    }

    fn word_as<T>(
        &mut self,
        expected: &'static str,
        value: impl FnOnce(&'a str) -> Option<T>,
    ) -> Result<T, LayoutProblem> {
        let before = Words { rest: self.rest };
        value(self.word()).ok_or_else(|| before.expected(expected))
    }

    fn end(&self) -> Result<(), LayoutProblem> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.expected("the end of the line")) }
    }

    fn expected(&self, expected: &'static str) -> LayoutProblem {
        LayoutProblem::Expected { expected, found: self.rest.to_owned() }
    }
}

fn check_vma(start: u64, end: u64, previous_end: u64) -> Result<(), LayoutProblem> {
    for address in [start, end] {
        if !address.is_multiple_of(PAGE_BYTES) {
            return Err(LayoutProblem::Unaligned { address });
        }
        // Bits 47 to 63 of an address are equal, and clear in the user half.
        match address >> 47 {
            0 if address <= USER_END => {}
            0 | 0x1_ffff => return Err(LayoutProblem::NotUser { address }),
            _ => return Err(LayoutProblem::NotCanonical { address }),
        }
    }
    if start >= end {
        return Err(LayoutProblem::EmptyVma { start, end });
    }
    if start < previous_end {
        return Err(LayoutProblem::VmaOrder { start, previous_end });
    }
    Ok(())
}

fn check_run(run: &PageRun, vma: &LayoutVma, word: &str) -> Result<(), LayoutProblem> {
    let nr_vma_pages = vma.nr_pages();
    if run.first_page.checked_add(run.nr_pages).is_none_or(|run_end| run_end > nr_vma_pages) {
        return Err(LayoutProblem::LeavesVma { found: word.to_owned(), nr_vma_pages });
    }
    let previous_end = vma.runs.last().map_or(0, |previous| previous.first_page + previous.nr_pages);
    if run.first_page < previous_end {
        return Err(LayoutProblem::RunOrder { first_page: run.first_page, previous_end });
    }
    let states = vma.kind.states();
    if !states.contains(&run.state) {
        let can = states.iter().map(|state| state.word()).collect::<Vec<_>>().join(", ");
        return Err(LayoutProblem::StateOfKind { kind: vma.kind.word(), can, found: run.state.word() });
    }
    let address = vma.address_of(run);
    let whole_leaves =
        (address / PAGE_BYTES).is_multiple_of(HUGE_PAGES) && run.nr_pages.is_multiple_of(HUGE_PAGES);
    if run.state.is_huge() && !whole_leaves {
        return Err(LayoutProblem::HugeUnaligned { address, nr_pages: run.nr_pages });
    }
    Ok(())
}

/// `FIRST` or `FIRST+COUNT`, where the count is at least one.
fn run(word: &str) -> Option<(u64, u64)> {
    let (first_page, nr_pages) = word.split_once('+').unwrap_or((word, "1"));
    let nr_pages = decimal(nr_pages).filter(|&nr_pages| nr_pages > 0)?;
    Some((decimal(first_page)?, nr_pages))
}

fn permissions(word: &str) -> Option<(Prot, Sharing)> {
    let &[read, write, exec, sharing] = word.as_bytes() else { return None };
    let set = |byte, letter| if byte == letter { Some(true) } else { (byte == b'-').then_some(false) };
    let prot = Prot { read: set(read, b'r')?, write: set(write, b'w')?, exec: set(exec, b'x')? };
    match sharing {
        b'p' => Some((prot, Sharing::Private)),
        b's' => Some((prot, Sharing::Shared)),
        _ => None,
    }
}

/// The character an escape stands for; the backslash is already read.
fn unescape(chars: &mut core::str::Chars<'_>) -> Option<char> {
    match chars.next()? {
        char @ ('"' | '\\') => Some(char),
        'u' => {
            let (digits, rest) = chars.as_str().strip_prefix('{')?.split_once('}')?;
            *chars = rest.chars();
            char::from_u32(u32::try_from(hexadecimal(digits)?).ok()?)
        }
        _ => None,
    }
}

/// Digits only: unlike `str::parse`, no sign.
fn decimal(digits: &str) -> Option<u64> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// Digits only, like [`decimal`].
fn hexadecimal(digits: &str) -> Option<u64> {
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u64::from_str_radix(digits, 16).ok())?
}
