//! Where the statements of a text in xl's syntax are; libxlutil only says what
//! they mean.

use std::ops::Range;

/// One `KEY = VALUE` of a text that libxlutil has understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// What stands before the `=`.
    pub key: String,
    /// From the first byte of the key to the last one of the value.
    pub range: Range<usize>,
    /// Whether there are comments within, between the items of a list.
    pub commented: bool,
}

/// All statements. They end with a line, or a ';', outside of brackets
/// (`libxlu_cfg_l.l`).
pub fn statements(text: &[u8]) -> Vec<Statement> {
    let mut found: Vec<Statement> = Vec::new();
    let mut rest = text.iter().copied().enumerate().peekable();
    let mut depth = 0_u32;
    let mut begins = true;
    while let Some((at, byte)) = rest.next() {
        match byte {
            b' ' | b'\t' | b'\r' => continue,
            b'#' => {
                while rest.next_if(|&(_, byte)| byte != b'\n').is_some() {}
                if let Some(statement) = found.last_mut().filter(|_| depth > 0) {
                    statement.commented = true;
                }
                continue;
            }
            b'\n' | b';' if depth == 0 => {
                begins = true;
                continue;
            }
            b'"' | b'\'' => {
                while let Some((_, other)) = rest.next() {
                    match other {
                        b'\\' => drop(rest.next()),
                        other if other == byte => break,
                        _ => {}
                    }
                }
            }
            b'[' => depth += 1,
            b']' => depth = depth.saturating_sub(1),
            b'A'..=b'Z' | b'a'..=b'z' | b'_' if begins => {
                let in_word = |byte: u8| byte.is_ascii_alphanumeric() || b"._".contains(&byte);
                let mut key = String::from(char::from(byte));
                while let Some((_, byte)) = rest.next_if(|&(_, byte)| in_word(byte)) {
                    key.push(char::from(byte));
                }
                found.push(Statement {
                    key,
                    range: at..at,
                    commented: false,
                });
                begins = false;
            }
            _ => {}
        }
        let end = rest.peek().map_or(text.len(), |&(next, _)| next);
        if let Some(statement) = found.last_mut().filter(|_| !begins) {
            statement.range.end = end;
        }
    }
    found
}

/// Warns of keys that mean nothing; libxlutil can't tell what else there is.
pub fn warn_of_unknown_keys(source: &str, text: &[u8], known: &[&str]) {
    for Statement { key, .. } in statements(text) {
        if !known.contains(&key.as_str()) {
            log::warn!(
                "{source}: '{key}' means nothing (there are {})",
                known.join(", ")
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::xlcfg::XlConfig;
    use super::*;

    fn keys(text: &[u8]) -> Vec<String> {
        let found = statements(text).into_iter();
        found.map(|statement| statement.key).collect()
    }

    #[test]
    fn keys_are_told_from_all_else() {
        let text = b"# precopymax = 1\nmembers = [ \"a\", # one = 1\n  'b;c=', \n \"d#\" ]\n\
                     \n  precopymax=30 # x = 2\nstore = \"/y = 3; z = 4\"; hold_kib += 5";
        let expected = ["members", "precopymax", "store", "hold_kib"];
        assert_eq!(keys(text), expected);
        assert!(XlConfig::parse("lab.cfg", &text[..text.len() - 15]).is_ok());
        assert!(keys(b"").is_empty() && keys(b"\"").is_empty());
    }

    #[test]
    fn an_escaped_quote_does_not_end_a_string() -> Result<(), String> {
        let text = b"a = \"x\\\" \\\\\"; b.c = 'y\\'; d = 1'\n";
        assert_eq!(keys(text), ["a", "b.c"]);
        let config = XlConfig::parse("lab.cfg", text)?;
        assert_eq!(config.string(c"a")?, Some("x\" \\".into()));
        assert_eq!(config.string(c"b.c")?, Some("y'; d = 1".into()));
        Ok(())
    }

    #[test]
    fn a_statement_ends_with_its_value() {
        let text = b"# of x\n a = [ 'x' ,\n 'y' # z\n ]  # behind\nb=1;c='#' \n d = 2";
        let parts: Vec<_> = statements(text)
            .into_iter()
            .map(|found| {
                let part = String::from_utf8_lossy(&text[found.range]).into_owned();
                (part, found.commented)
            })
            .collect();
        let expected = [
            ("a = [ 'x' ,\n 'y' # z\n ]", true),
            ("b=1", false),
            ("c='#'", false),
            ("d = 2", false),
        ];
        assert_eq!(parts, expected.map(|(part, is)| (part.to_owned(), is)));
    }
}
