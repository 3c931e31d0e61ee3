//! Flags of a call, by name or by number: `A|B`, `0x3`, `0x3 /* A|B */`, `A|0x80 /* B */`.

/// What a word of flags stands for.
#[derive(Debug, PartialEq, Eq, Default)]
pub(super) struct Flags<'a> {
    /// The bits of the names that are known, and of numbers.
    pub(super) bits: u64,
    /// Names that are not.
    pub(super) unknown: Vec<&'a str>,
}

impl Flags<'_> {
    pub(super) const fn has(&self, bits: u64) -> bool {
        self.bits & bits == bits
    }
}

/// Names and the bits they stand for.
pub(super) type Names = [(&'static str, u64)];

pub(super) const PROT: &Names = &[("PROT_NONE", 0), ("PROT_READ", 1), ("PROT_WRITE", 2), ("PROT_EXEC", 4)];

pub(super) const MAP_SHARED: u64 = 1;
pub(super) const MAP_PRIVATE: u64 = 2;
pub(super) const MAP_FIXED: u64 = 0x10;
pub(super) const MAP_ANONYMOUS: u64 = 0x20;
pub(super) const MAP_GROWSDOWN: u64 = 0x100;
/// What says how the range is shared: bits 0 to 3.
pub(super) const MAP_TYPE: u64 = 0xf;

pub(super) const MAP: &Names = &[
    ("MAP_SHARED", MAP_SHARED),
    ("MAP_PRIVATE", MAP_PRIVATE),
    ("MAP_SHARED_VALIDATE", 3),
    ("MAP_FIXED", MAP_FIXED),
    ("MAP_ANONYMOUS", MAP_ANONYMOUS),
    ("MAP_ANON", MAP_ANONYMOUS),
    ("MAP_GROWSDOWN", MAP_GROWSDOWN),
];

pub(super) const MREMAP_DONTUNMAP: u64 = 4;
pub(super) const MREMAP: &Names =
    &[("MREMAP_MAYMOVE", 1), ("MREMAP_FIXED", 2), ("MREMAP_DONTUNMAP", MREMAP_DONTUNMAP)];

pub(super) const CLONE_VM: u64 = 0x100;
pub(super) const CLONE_VFORK: u64 = 0x4000;
pub(super) const CLONE: &Names = &[("CLONE_VM", CLONE_VM), ("CLONE_VFORK", CLONE_VFORK)];

pub(super) const SHM_RDONLY: u64 = 0o10_000;
pub(super) const SHM_REMAP: u64 = 0o40_000;
pub(super) const SHM_EXEC: u64 = 0o100_000;
pub(super) const SHM: &Names =
    &[("SHM_RDONLY", SHM_RDONLY), ("SHM_REMAP", SHM_REMAP), ("SHM_EXEC", SHM_EXEC)];

/// Reads flags. A name may be followed by a remark in `/* */`, and so may a number, which is then
/// what counts.
pub(super) fn flags<'a>(text: &'a str, names: &Names) -> Flags<'a> {
    let mut flags = Flags::default();
    for word in without_remarks(text).flat_map(|part| part.split('|')) {
        let word = word.trim_ascii();
        if let Some((_, bits)) = names.iter().find(|(name, _)| *name == word) {
            flags.bits |= bits;
        } else if let Some(bits) = number(word) {
            flags.bits |= bits;
        } else if !word.is_empty() {
            flags.unknown.push(word);
        }
    }
    flags
}

fn without_remarks(text: &str) -> impl Iterator<Item = &str> {
    text.split("/*").enumerate().map(|(index, part)| match index {
        0 => part,
        _ => part.split_once("*/").map_or("", |(_, after)| after),
    })
}

/// Decimal or hexadecimal digits.
fn number(word: &str) -> Option<u64> {
    let number = match word.strip_prefix("0x") {
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16)
        }
        _ if word.bytes().all(|byte| byte.is_ascii_digit()) => word.parse(),
        _ => return None,
    };
    number.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_say_the_same() {
        for text in [
            "MAP_PRIVATE|MAP_ANONYMOUS",
            "0x22",
            "34",
            "0x22 /* MAP_PRIVATE|MAP_ANONYMOUS */",
            "MAP_PRIVATE|0x20 /* MAP_??? */",
            "MAP_ANON|MAP_PRIVATE",
        ] {
            assert_eq!(flags(text, MAP), Flags { bits: 0x22, unknown: vec![] }, "{text}");
        }
        let other = flags("MAP_SHARED|MAP_HUGETLB|21<<MAP_HUGE_SHIFT", MAP);
        assert_eq!(other, Flags { bits: 1, unknown: vec!["MAP_HUGETLB", "21<<MAP_HUGE_SHIFT"] });
        assert_eq!(flags("/* open", MAP), Flags::default());
    }
}
