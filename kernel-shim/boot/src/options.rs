//! The kernel command line: words of the form `key=value`, from QEMU's `-append`.

/// A parsed view of the command line; nothing is copied.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    line: &'a str,
}

impl<'a> Options<'a> {
    /// Reads `line`: words separated by white space.
    #[must_use]
    pub const fn new(line: &'a str) -> Self {
        Self { line }
    }

    /// Returns the whole line, to be printed.
    #[must_use]
    pub const fn line(&self) -> &'a str {
        self.line
    }

    /// Returns the value of `key`; of several, the last; `""` for a word without `=`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.pairs().filter(|(name, _)| *name == key).map(|(_, value)| value).last()
    }

    /// Returns the value of `key` as a number.
    ///
    /// # Errors
    ///
    /// The value itself, where it is not a decimal number.
    pub fn number(&self, key: &str) -> Result<Option<u64>, &'a str> {
        self.get(key).map(|value| value.parse().map_err(|_| value)).transpose()
    }

    /// Returns the keys that are not among `known`, so that a misspelt option is refused and not
    /// ignored.
    pub fn unknown<'k>(&self, known: &'k [&str]) -> impl Iterator<Item = &'a str> + use<'a, 'k> {
        self.pairs().map(|(name, _)| name).filter(|name| !known.contains(name))
    }

    fn pairs(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        self.line.split_ascii_whitespace().map(|word| word.split_once('=').unwrap_or((word, "")))
    }
}

#[cfg(test)]
mod tests {
    use super::Options;

    #[test]
    fn the_last_value_of_a_repeated_key_wins() {
        let options = Options::new(" workload=churn fault=none\tworkload=threads quiet ");
        assert_eq!(options.get("workload"), Some("threads"));
        assert_eq!(options.get("quiet"), Some(""));
        assert_eq!(options.get("absent"), None);
    }

    #[test]
    fn a_number_that_is_none_is_an_error_with_its_text() {
        let options = Options::new("seconds=20 pages=many");
        assert_eq!(options.number("seconds"), Ok(Some(20)));
        assert_eq!(options.number("pages"), Err("many"));
        assert_eq!(options.number("absent"), Ok(None));
    }

    #[test]
    fn a_misspelt_key_cannot_pass_unseen() {
        let options = Options::new("falt=skip-local-flush workload=churn");
        assert!(options.unknown(&["fault", "workload"]).eq(["falt"]));
    }
}
