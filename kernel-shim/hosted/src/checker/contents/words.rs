//! Words, each of which stands for all that is in half a page.

use core::fmt;
use core::ops::Range;

use rustc_hash::FxHashMap;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::checker::ledger::{frame_numbered, frames_of};
use crate::memory::index;
use crate::vocabulary::{FrameRole, Place};

/// The bit of a word that a program has written, of a page of a file that nobody has written to,
/// and of what is left in a frame.
const WRITTEN: u64 = 1 << 63;
const OF_A_FILE: u64 = 1 << 62;
const LEFT: u64 = 1 << 61;
/// Bits of the number of a page of a file.
const PAGE_BITS: u32 = 48;

/// Half of a page, so that one half can be written to, and the other must stay as it was.
pub(crate) const HALF_SHIFT: u32 = 11;

/// Frames whose words lie together.
const CHUNK: usize = 512;

/// What is in half a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Word(u64);

/// What a word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Says {
    /// Nothing was ever there.
    Zeroes,
    /// A program has written this, by its number.
    Written(usize),
    /// The page of a file, as it is on the disk.
    OfAFile,
    /// The kernel has not filled the frame since it took it.
    Left,
}

impl Word {
    pub(crate) const ZEROES: Self = Self(0);

    /// What both halves of the page of a file hold before anybody writes to it.
    pub(crate) const fn of_a_file(file: u32, page: u64) -> Self {
        Self(OF_A_FILE | (file as u64 & 0xfff) << PAGE_BITS | page & ((1 << PAGE_BITS) - 1))
    }

    const fn left_in(number: usize) -> Self {
        Self(LEFT | number as u64)
    }

    pub(crate) fn says(self) -> Says {
        match self.0 {
            0 => Says::Zeroes,
            word if word & WRITTEN != 0 => Says::Written(index(word & !WRITTEN)),
            word if word & OF_A_FILE != 0 => Says::OfAFile,
            _ => Says::Left,
        }
    }
}

type Halves = [Word; 2];

/// What is in 512 frames, where large pages may lie. Most of a machine's memory is never used, and
/// large pages are mostly filled as a whole.
#[derive(Clone, Debug)]
enum Chunk {
    Zeroes,
    /// They were given out, and nobody has filled any of them.
    Left,
    Each(Box<[Halves; CHUNK]>),
}

/// What a program has written, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writer {
    pub(crate) root: PhysFrame,
    pub(crate) address: u64,
}

/// The words of all frames, and of the disk.
#[derive(Debug)]
pub(crate) struct Words {
    /// By number, 512 at a time.
    frames: Vec<Chunk>,
    disk: FxHashMap<Place, Halves>,
    writers: Vec<Writer>,
    nr_accesses: u64,
}

impl Words {
    pub(crate) fn new(nr_frames: u64) -> Self {
        Self {
            frames: vec![Chunk::Zeroes; index(nr_frames).div_ceil(CHUNK)],
            disk: FxHashMap::default(),
            writers: Vec::new(),
            nr_accesses: 0,
        }
    }

    /// What is in half of a frame; zeroes beyond the machine's memory.
    pub(crate) fn at(&self, address: PhysAddr) -> Word {
        self.halves_of(frame_at(address))[half(address.as_u64())]
    }

    /// What is in half of a place on a disk: the half that belongs at this address.
    pub(crate) fn on_disk(&self, place: Place, address: u64) -> Word {
        self.halves_on_disk(place)[half(address)]
    }

    /// A frame was given out. It holds what its last owner has left, and a frame of zeroes or a
    /// table something that nobody may take for his own.
    pub(crate) fn given_out(&mut self, frame: PhysFrame, role: FrameRole) {
        let numbers = frames_of(frame, role);
        if let Some(chunk @ Chunk::Zeroes) = self.whole_chunk(&numbers) {
            *chunk = Chunk::Left;
            return;
        }
        for number in numbers {
            let Some(halves) = self.place_of(number) else { continue };
            for word in halves {
                if *word == Word::ZEROES || role == FrameRole::Table {
                    *word = Word::left_in(number);
                }
            }
        }
    }

    /// The half of the page at `address` that the next access uses.
    pub(crate) fn half_of(&mut self, address: u64) -> u64 {
        self.nr_accesses += 1;
        // Not in turn: accesses come in patterns.
        let is_upper = self.nr_accesses.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63;
        address & !0xfff | is_upper << HALF_SHIFT
    }

    /// A program writes there: a word that nobody has written before.
    pub(crate) fn write(&mut self, to: PhysAddr, writer: Writer) -> Word {
        let word = Word(WRITTEN | self.writers.len() as u64);
        self.writers.push(writer);
        if let Some(halves) = self.place_of(number(frame_at(to))) {
            halves[half(to.as_u64())] = word;
        }
        word
    }

    pub(crate) fn zero(&mut self, first: PhysFrame, count: u64) {
        let mut next = number(first);
        let end = next + index(count);
        while next < end {
            if let Some(chunk) = self.whole_chunk(&(next..end.min(next + CHUNK))) {
                *chunk = Chunk::Zeroes;
                next += CHUNK;
            } else {
                self.set(next, Halves::default());
                next += 1;
            }
        }
    }

    pub(crate) fn copy(&mut self, from: PhysFrame, to: PhysFrame) {
        self.set(number(to), self.halves_of(from));
    }

    pub(crate) fn store(&mut self, frame: PhysFrame, place: Place) {
        self.disk.insert(place, self.halves_of(frame));
    }

    pub(crate) fn load(&mut self, place: Place, frame: PhysFrame) {
        self.set(number(frame), self.halves_on_disk(place));
    }

    /// Who has written it, if a program has.
    pub(crate) fn writer_of(&self, word: Word) -> Option<Writer> {
        match word.says() {
            Says::Written(number) => self.writers.get(number).copied(),
            Says::Zeroes | Says::OfAFile | Says::Left => None,
        }
    }

    /// What a word says, in words.
    pub(crate) fn told(&self, word: Word) -> impl fmt::Display {
        match (word.says(), self.writer_of(word)) {
            (_, Some(Writer { root, address })) => {
                let root = root.start_address();
                format!("what a program of the address space with root {root:#x} has written to {address:#x}")
            }
            (Says::OfAFile, _) => {
                let page = word.0 & ((1 << PAGE_BITS) - 1);
                format!("page {page:#x} of file {}", (word.0 & !OF_A_FILE) >> PAGE_BITS)
            }
            (Says::Left, _) => {
                let frame = frame_numbered(index(word.0 & !LEFT));
                format!("what was left in frame {:#x}", frame.start_address())
            }
            (Says::Zeroes | Says::Written(_), _) => "zeroes".to_owned(),
        }
    }

    fn set(&mut self, number: usize, new: Halves) {
        if let Some(halves) = self.place_of(number) {
            *halves = new;
        }
    }

    fn halves_of(&self, frame: PhysFrame) -> Halves {
        let number = number(frame);
        match self.frames.get(number / CHUNK) {
            Some(Chunk::Each(each)) => each[number % CHUNK],
            Some(Chunk::Left) => [Word::left_in(number); 2],
            Some(Chunk::Zeroes) | None => Halves::default(),
        }
    }

    fn place_of(&mut self, number: usize) -> Option<&mut Halves> {
        let chunk = self.frames.get_mut(number / CHUNK)?;
        let first = number - number % CHUNK;
        let each: [Halves; CHUNK] = match chunk {
            Chunk::Each(each) => return Some(&mut each[number % CHUNK]),
            Chunk::Zeroes => [Halves::default(); CHUNK],
            Chunk::Left => core::array::from_fn(|inside| [Word::left_in(first + inside); 2]),
        };
        *chunk = Chunk::Each(Box::new(each));
        match chunk {
            Chunk::Each(each) => Some(&mut each[number % CHUNK]),
            Chunk::Zeroes | Chunk::Left => None,
        }
    }

    /// The chunk that is made of the frames with these numbers, if they are a whole one.
    fn whole_chunk(&mut self, numbers: &Range<usize>) -> Option<&mut Chunk> {
        let is_whole = numbers.len() == CHUNK && numbers.start.is_multiple_of(CHUNK);
        self.frames.get_mut(numbers.start / CHUNK).filter(|_| is_whole)
    }

    fn halves_on_disk(&self, place: Place) -> Halves {
        let as_it_was = || match place {
            Place::File { file, page } => [Word::of_a_file(file, page); 2],
            Place::Swap { .. } => Halves::default(),
        };
        self.disk.get(&place).copied().unwrap_or_else(as_it_was)
    }
}

fn half(address: u64) -> usize {
    index(address >> HALF_SHIFT & 1)
}

fn number(frame: PhysFrame) -> usize {
    index(frame.start_address().as_u64() >> 12)
}

/// The frame with a byte at this address.
pub(crate) fn frame_at(address: PhysAddr) -> PhysFrame {
    PhysFrame::containing_address(address)
}
