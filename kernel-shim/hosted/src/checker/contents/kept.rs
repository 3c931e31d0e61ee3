//! What is kept of contents, and how it is told.

use x86_64::structures::paging::PhysFrame;

use crate::checker::contents::truth::Truth;
use crate::checker::contents::words::{Says, Word, Words};
use crate::checker::kind::ViolationKind;

/// What is kept of contents, of one machine.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(super) words: Words,
    pub(super) truth: Truth,
}

impl Kept {
    pub(super) fn told(&self, found: Word, expected: Word) -> String {
        format!("it reads {}, and is to read {}", self.words.told(found), self.words.told(expected))
    }
}

impl Words {
    /// What is wrong where a program of `root` reads `found` and should not.
    pub(super) fn kind_of(&self, root: PhysFrame, found: Word) -> ViolationKind {
        match (found.says(), self.writer_of(found)) {
            (_, Some(writer)) if writer.root == root => ViolationKind::ContentOfElsewhere,
            (Says::Written(_), _) => ViolationKind::ContentOfAnother,
            (Says::Left, _) => ViolationKind::ContentLeft,
            (Says::Zeroes | Says::OfAFile, _) => ViolationKind::ContentLost,
        }
    }
}
