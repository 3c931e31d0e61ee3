//! Numbers as strace writes them.

/// `NULL`, `0x...` or decimal digits, with nothing else but a remark behind a space.
pub(crate) fn number(text: &str) -> Option<u64> {
    let word = text.split_once(' ').map_or(text, |(word, _)| word);
    if word == "NULL" {
        return Some(0);
    }
    let (digits, radix) = word.strip_prefix("0x").map_or((word, 10), |digits| (digits, 16));
    // `from_str_radix` alone would take a sign.
    let digits_only = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits_only.then(|| u64::from_str_radix(digits, radix).ok())?
}

/// A thread's number: decimal digits.
pub(crate) fn number32(text: &str) -> Option<u32> {
    number(text)
        .filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|number| u32::try_from(number).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_no_sign_and_do_not_wrap() {
        assert_eq!(number("NULL"), Some(0));
        assert_eq!(number("0x10 /* sixteen */"), Some(16));
        for text in ["", "0x", "-1", "+1", "18446744073709551616", "ff"] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
