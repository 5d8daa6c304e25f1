//! What was measured, and what is made of it: a table, and JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::targets::{Target, TARGETS};

/// Values of one kind, one a repetition.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Figure {
    /// The part of the benchmark that measured it.
    #[serde(default)]
    pub part: String,
    /// What it is.
    pub name: String,
    /// Of the values; empty for ratios.
    pub unit: String,
    /// In the order in which they were measured.
    pub values: Vec<f64>,
}

impl Figure {
    /// The middle one, the upper of two.
    pub fn median(&self) -> f64 {
        median(&self.values)
    }

    /// The smallest.
    pub fn least(&self) -> f64 {
        self.values.iter().copied().fold(f64::NAN, f64::min)
    }

    /// The largest.
    pub fn most(&self) -> f64 {
        self.values.iter().copied().fold(f64::NAN, f64::max)
    }

    fn json(&self) -> Value {
        json!({
            "part": self.part,
            "name": self.name,
            "unit": self.unit,
            "median": self.median(),
            "least": self.least(),
            "most": self.most(),
            "values": self.values,
        })
    }
}

/// The middle one, the upper of two; not a number if there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// All that a run has measured.
#[derive(Debug, Default)]
pub struct Book {
    part: String,
    figures: Vec<Figure>,
    targets: BTreeMap<&'static str, f64>,
    missing: BTreeMap<&'static str, String>,
}

impl Book {
    /// What is added from now on is of this part.
    pub fn begin(&mut self, part: &str) {
        part.clone_into(&mut self.part);
    }

    /// Adds values to a figure of the part; none adds nothing.
    pub fn add(&mut self, name: &str, unit: &str, values: impl IntoIterator<Item = f64>) {
        let part = &self.part;
        let known = self
            .figures
            .iter_mut()
            .find(|figure| figure.part == *part && figure.name == name);
        if let Some(figure) = known {
            figure.values.extend(values);
            return;
        }
        let figure = Figure {
            part: part.clone(),
            name: name.to_owned(),
            unit: unit.to_owned(),
            values: values.into_iter().collect(),
        };
        if !figure.values.is_empty() {
            self.figures.push(figure);
        }
    }

    /// A figure of the part.
    ///
    /// # Errors
    ///
    /// If it wasn't measured.
    pub fn median(&self, name: &str) -> Result<f64> {
        self.of(&self.part)
            .find(|figure| figure.name == name)
            .map(Figure::median)
            .with_context(|| format!("{}: {name} wasn't measured", self.part))
    }

    /// A part's figures.
    pub fn of<'a>(&'a self, part: &'a str) -> impl Iterator<Item = &'a Figure> {
        self.figures
            .iter()
            .filter(move |figure| figure.part == part)
    }

    /// Says what came of a target. A value that is no number is as good as none.
    pub fn target(&mut self, name: &'static str, value: f64) {
        if value.is_finite() {
            self.targets.insert(name, value);
        }
    }

    /// Says why these targets weren't measured, those that weren't.
    pub fn miss(&mut self, names: &[&'static str], why: &str) {
        for name in names {
            if !self.targets.contains_key(name) {
                self.missing.insert(name, why.to_owned());
            }
        }
    }

    /// Targets with what came of them.
    pub fn results(&self) -> impl Iterator<Item = (&'static Target, Option<f64>)> + '_ {
        TARGETS
            .iter()
            .map(|target| (target, self.targets.get(target.name).copied()))
    }

    /// For a program; described in `plugin/docs/benchmarks.md`.
    pub fn json(&self, quick: bool, seconds: u64) -> Value {
        let figures: Vec<Value> = self.figures.iter().map(Figure::json).collect();
        json!({
            "format": 1,
            "quick": quick,
            "seconds": seconds,
            "targets": self.targets,
            "missing": self.missing,
            "figures": figures,
        })
    }

    /// For people: medians and extremes, then the targets.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut part = "";
        for figure in &self.figures {
            if figure.part != part {
                part = &figure.part;
                let _ = writeln!(text, "{part}");
            }
            let spread = match figure.values.len() {
                1 => String::new(),
                count => format!(
                    "({} to {}, {count} times)",
                    short(figure.least()),
                    short(figure.most())
                ),
            };
            let line = format!(
                "  {:<52} {:>9} {:<8} {spread}",
                figure.name,
                short(figure.median()),
                figure.unit
            );
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let _ = writeln!(text, "targets");
        for (target, value) in self.results() {
            let line = match value {
                Some(value) => {
                    let word = if target.met(value) { "met" } else { "missed" };
                    format!("{:>9} {:<9} {word}", short(value), target.bound())
                }
                None => {
                    let why = self.missing.get(target.name).map(String::as_str);
                    let bound = target.bound();
                    format!("{:>9} {bound:<9} {}", "-", why.unwrap_or("not run"))
                }
            };
            let _ = writeln!(text, "  {:<28} {line}", target.name);
        }
        text
    }
}

/// A number with as many digits as say something.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book() -> Book {
        let mut book = Book::default();
        book.begin("downtime");
        book.add("floor", "ms", [3.0, 1.0, 2.0]);
        book.add("floor", "ms", [9.0]);
        book.target("downtime_over_floor", 1.25);
        book.target("frames_dropped", f64::NAN);
        book.miss(&["frames_dropped", "downtime_over_floor"], "no wire");
        book
    }

    #[test]
    fn the_json_has_targets_as_numbers_and_names_what_is_missing() {
        let json = book().json(true, 3);
        assert_eq!(json["format"], 1);
        assert_eq!(json["targets"], json!({ "downtime_over_floor": 1.25 }));
        assert_eq!(json["missing"], json!({ "frames_dropped": "no wire" }));
        let figure = &json["figures"][0];
        assert_eq!(figure["part"], "downtime");
        assert_eq!(figure["values"], json!([3.0, 1.0, 2.0, 9.0]));
        assert_eq!(
            [&figure["least"], &figure["median"], &figure["most"]],
            [&json!(1.0), &json!(3.0), &json!(9.0)]
        );
    }

    #[test]
    fn the_table_says_what_was_met_and_what_wasnt_measured() {
        let table = book().table();
        let line = |name: &str| {
            let found = table.lines().find(|line| line.trim().starts_with(name));
            found.unwrap_or_default().to_owned()
        };
        assert!(line("downtime_over_floor").ends_with("met"), "{table}");
        assert!(line("frames_dropped").ends_with("no wire"), "{table}");
        assert!(line("skew_over_downtime").ends_with("not run"), "{table}");
        assert!(line("floor").contains("(1 to 9, 4 times)"), "{table}");
    }

    #[test]
    fn a_figure_that_wasnt_measured_is_an_error() {
        assert!(book().median("live").is_err());
        assert!(book().median("floor").is_ok_and(|value| value == 3.0));
    }
}
