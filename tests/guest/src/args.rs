//! Options of the workloads: `--name value`, and words.

use std::collections::BTreeMap;
use std::str::FromStr;

/// A command line taken apart.
pub struct Args {
    options: BTreeMap<String, String>,
    /// What isn't an option.
    pub words: Vec<String>,
}

impl Args {
    /// Takes a command line apart; only the given options exist.
    pub fn parse(line: &[String], known: &[&str]) -> Result<Self, String> {
        let mut options = BTreeMap::new();
        let mut words = Vec::new();
        let mut rest = line.iter();
        while let Some(word) = rest.next() {
            let Some(name) = word.strip_prefix("--") else {
                words.push(word.clone());
                continue;
            };
            if !known.contains(&name) {
                return Err(format!("there's no option --{name}"));
            }
            let value = rest
                .next()
                .ok_or_else(|| format!("--{name} wants a value"))?;
            options.insert(name.to_owned(), value.clone());
        }
        Ok(Args { options, words })
    }

    /// An option's value, when it's given.
    pub fn get<T: FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        self.options
            .get(name)
            .map(|text| {
                text.parse()
                    .map_err(|_| format!("--{name} can't be {text:?}"))
            })
            .transpose()
    }

    /// An option that must be given.
    pub fn need<T: FromStr>(&self, name: &str) -> Result<T, String> {
        self.get(name)?
            .ok_or_else(|| format!("--{name} is missing"))
    }

    /// An option's value, else the usual one.
    pub fn or<T: FromStr>(&self, name: &str, usual: T) -> Result<T, String> {
        Ok(self.get(name)?.unwrap_or(usual))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn options_and_words_are_told_apart() -> Result<(), String> {
        let args = Args::parse(&line("a --n 3 b"), &["n"])?;
        assert_eq!(args.words, ["a", "b"]);
        assert_eq!(args.need::<u32>("n")?, 3);
        assert_eq!(args.or("m", 7)?, 7);
        Ok(())
    }

    #[test]
    fn unknown_and_unfinished_options_are_refused() {
        assert!(Args::parse(&line("--x 1"), &["n"]).is_err());
        assert!(Args::parse(&line("--n"), &["n"]).is_err());
    }
}
