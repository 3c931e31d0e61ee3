//! A number with its noun, in the singular or the plural.

use core::fmt;

/// Prints as `1 CPU` or `4 CPUs`; the noun is one that takes an `s`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counted(pub(crate) u64, pub(crate) &'static str);

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number, noun) = self;
        let ending = if *number == 1 { "" } else { "s" };
        write!(f, "{number} {noun}{ending}")
    }
}

#[cfg(test)]
mod tests {
    use alloc::format;

    use super::Counted;

    #[test]
    fn one_is_singular_and_anything_else_is_plural() {
        let text = [0, 1, 2].map(|number| format!("{}", Counted(number, "step")));
        assert_eq!(text, ["0 steps", "1 step", "2 steps"]);
    }
}
