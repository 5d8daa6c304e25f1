//! As much JSON as the counters need.

use std::fmt::Write;

/// An object being written.
pub struct Json {
    text: String,
}

impl Json {
    /// Starts an object.
    pub fn new() -> Self {
        Json {
            text: String::from("{"),
        }
    }

    /// Adds a number.
    pub fn number(&mut self, name: &str, value: impl Into<i128>) -> &mut Self {
        self.name(name);
        // Writing to a string can't fail.
        let _ = write!(self.text, "{}", value.into());
        self
    }

    /// Adds a number, or null.
    pub fn maybe(&mut self, name: &str, value: Option<u64>) -> &mut Self {
        match value {
            Some(value) => self.number(name, value),
            None => self.raw(name, "null"),
        }
    }

    /// Adds true or false.
    pub fn flag(&mut self, name: &str, value: bool) -> &mut Self {
        self.raw(name, if value { "true" } else { "false" })
    }

    /// Adds a text.
    pub fn text(&mut self, name: &str, value: &str) -> &mut Self {
        self.name(name);
        self.string(value);
        self
    }

    /// Adds an object.
    pub fn object(&mut self, name: &str, value: Json) -> &mut Self {
        let text = value.finish();
        self.raw(name, &text)
    }

    /// Adds a list of objects.
    pub fn list(&mut self, name: &str, values: Vec<Json>) -> &mut Self {
        let items: Vec<String> = values.into_iter().map(Json::finish).collect();
        self.raw(name, &format!("[{}]", items.join(",")))
    }

    /// The object as text.
    pub fn finish(mut self) -> String {
        self.text.push('}');
        self.text
    }

    fn raw(&mut self, name: &str, value: &str) -> &mut Self {
        self.name(name);
        self.text.push_str(value);
        self
    }

    fn name(&mut self, name: &str) {
        if self.text.len() > 1 {
            self.text.push(',');
        }
        self.string(name);
        self.text.push(':');
    }

    fn string(&mut self, value: &str) {
        self.text.push('"');
        for c in value.chars() {
            match c {
                '"' | '\\' => {
                    self.text.push('\\');
                    self.text.push(c);
                }
                c if (c as u32) < 0x20 => {
                    // Writing to a string can't fail.
                    let _ = write!(self.text, "\\u{:04x}", c as u32);
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_nest_and_texts_are_escaped() {
        let mut inner = Json::new();
        inner.number("n", -1).maybe("m", None);
        let mut json = Json::new();
        json.text("a", "x\"\\\n").flag("b", true);
        json.object("c", inner).list("d", vec![Json::new()]);
        assert_eq!(
            json.finish(),
            r#"{"a":"x\"\\\u000a","b":true,"c":{"n":-1,"m":null},"d":[{}]}"#
        );
    }
}
