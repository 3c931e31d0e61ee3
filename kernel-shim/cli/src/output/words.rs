//! Numbers in sentences.

/// A number with its noun, in the singular or the plural.
pub(crate) fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular_and_all_else_plural() {
        assert_eq!(counted(0, "page", "pages"), "0 pages");
        assert_eq!(counted(1, "address space", "address spaces"), "1 address space");
        assert_eq!(counted(2, "leaf", "leaves"), "2 leaves");
    }
}
