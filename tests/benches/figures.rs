//! Figures of several rounds, for people and for a program.

use std::path::Path;

use serde_json::{json, Value};

use crate::synthetic::Result;

/// Values of one kind, one a round.
pub struct Figure {
    name: String,
    unit: &'static str,
    values: Vec<f64>,
}

/// All of them, in the order in which they first came.
#[derive(Default)]
pub struct Figures(Vec<Figure>);

impl Figures {
    /// Adds a round's value.
    pub fn add(&mut self, name: &str, unit: &'static str, value: f64) {
        match self.0.iter_mut().find(|figure| figure.name == name) {
            Some(figure) => figure.values.push(value),
            None => self.0.push(Figure {
                name: name.to_owned(),
                unit,
                values: vec![value],
            }),
        }
    }

    /// Prints a line for each: median, and the extremes where there are some.
    pub fn print(&self) {
        for Figure { name, unit, values } in &self.0 {
            let mut sorted = values.clone();
            sorted.sort_by(f64::total_cmp);
            let (Some(least), Some(median), Some(most)) =
                (sorted.first(), sorted.get(sorted.len() / 2), sorted.last())
            else {
                continue;
            };
            let spread = match sorted.len() {
                1 => String::new(),
                _ => format!("  ({least:.2} to {most:.2})"),
            };
            println!("{name:<40} {median:>10.2} {unit:<5}{spread}");
        }
    }

    /// Writes them to the file that `VNE_BENCH_JSON` names, if it does.
    pub fn save(&self) -> Result<()> {
        let Some(path) = std::env::var_os("VNE_BENCH_JSON") else {
            return Ok(());
        };
        let one = |figure: &Figure| json!({ "name": figure.name, "unit": figure.unit, "values": figure.values });
        let all: Vec<Value> = self.0.iter().map(one).collect();
        Ok(std::fs::write(
            Path::new(&path),
            Value::from(all).to_string(),
        )?)
    }
}

/// A number in the environment, else the usual one.
pub fn setting(name: &str, usual: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => Ok(text
            .parse()
            .map_err(|_| format!("{name}={text} is no number"))?),
        Err(_) => Ok(usual),
    }
}
