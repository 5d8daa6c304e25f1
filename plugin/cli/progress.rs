//! Showing a take while it works: a block that is redrawn on a terminal, a
//! line per phase elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::units::ms;
use crate::cut::Phase;
use crate::domain::messages::CutTimes;
use crate::domain::policy::Round;
use crate::domain::DomainFacts;
use crate::sidecar::engine::Progress;
use crate::sidecar::manifest::downtime;

const REDRAW_INTERVAL: Duration = Duration::from_millis(100);

/// Prints to stderr, so that stdout is the result's alone.
pub struct Printer {
    members: Vec<MemberLine>,
    phase: Phase,
    quiet: bool,
    terminal: bool,
    drawn_lines: usize,
    drawn_at: Option<Instant>,
}

struct MemberLine {
    name: String,
    pages: u64,
    text: String,
}

impl Printer {
    /// For these members.
    pub fn new(members: &[String], quiet: bool) -> Self {
        let line = |name: &String| MemberLine {
            name: name.clone(),
            pages: 0,
            text: String::from("-"),
        };
        Self {
            members: members.iter().map(line).collect(),
            phase: Phase::Prepare,
            quiet,
            terminal: std::io::stderr().is_terminal(),
            drawn_lines: 0,
            drawn_at: None,
        }
    }

    fn say(&mut self, index: usize, text: String, always: bool) {
        if let Some(line) = self.members.get_mut(index) {
            line.text = text;
        }
        if always && !self.terminal {
            if let Some(line) = self.members.get(index) {
                self.write(&format!("  {}: {}\n", line.name, line.text));
            }
        }
        self.draw(always);
    }

    fn draw(&mut self, always: bool) {
        let soon = self
            .drawn_at
            .is_some_and(|at| at.elapsed() < REDRAW_INTERVAL);
        if !self.terminal || self.quiet || (soon && !always) {
            return;
        }
        let mut text = String::new();
        if self.drawn_lines > 0 {
            // Up to the block's first line; each line then clears its rest.
            text.push_str(&format!("\x1b[{}A", self.drawn_lines));
        }
        text.push_str(&format!("{}\x1b[K\n", self.phase));
        for line in &self.members {
            text.push_str(&format!("  {:<20} {}\x1b[K\n", line.name, line.text));
        }
        self.drawn_lines = self.members.len() + 1;
        self.drawn_at = Some(Instant::now());
        self.write(&text);
    }

    fn write(&self, text: &str) {
        if !self.quiet {
            // Progress that can't be shown must not fail a snapshot.
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }
}

impl Progress for Printer {
    fn planned(&mut self, members: &[DomainFacts]) {
        for (index, facts) in members.iter().enumerate() {
            if let Some(line) = self.members.get_mut(index) {
                line.pages = facts.memory_kib / 4;
            }
        }
    }

    fn phase(&mut self, phase: Phase) {
        self.phase = phase;
        if !self.terminal {
            self.write(&format!("{phase}\n"));
        }
        self.draw(true);
    }

    fn round(&mut self, member: usize, round: Round, converged: bool) {
        let state = if converged { "hovering" } else { "copying" };
        let text = format!(
            "{state}: round {}, {} pages in {}",
            round.iteration,
            round.pages,
            ms(round.duration_ns)
        );
        // Off a terminal only the first round is worth a line.
        self.say(member, text, round.iteration == 0);
    }

    fn cut(&mut self, member: usize, times: &CutTimes) {
        let text = format!("cut, down for {}", ms(downtime(times).total_ns()));
        self.say(member, text, true);
    }

    fn stored(&mut self, member: usize) {
        self.say(member, String::from("stored"), true);
    }
}
