//! The timeline on a terminal: in letters, so that any terminal, log or mail
//! shows it.

use super::super::units::ms;
use super::{ticks, time, Drawing, Kind, Lane, Span};

const WIDTH_DEFAULT: usize = 100;
const WIDTH_MIN: usize = 60;
const WIDTH_MAX: usize = 240;
/// Longest name that is shown in full.
const NAME_MAX: usize = 24;
/// Rounds whose pages are told one by one.
const ROUNDS_TOLD: usize = 12;

/// The terminal's width, or one that suits most.
pub fn width() -> usize {
    let terminal = rustix::termios::tcgetwinsize(rustix::stdio::stdout());
    let columns = terminal.map_or(0, |size| usize::from(size.ws_col));
    match columns {
        0 => WIDTH_DEFAULT,
        columns => columns.clamp(WIDTH_MIN, WIDTH_MAX),
    }
}

fn letter(kind: Kind) -> char {
    match kind {
        Kind::Round => '=',
        Kind::Hover => '~',
        Kind::Held => 'h',
        Kind::Suspend => 's',
        Kind::Pages => 'p',
        Kind::State => 'd',
        Kind::Resume => 'r',
        Kind::Finalise => 'w',
    }
}

/// Draws it into lines that are `width` long at most.
pub fn draw(drawing: &Drawing, width: usize) -> String {
    let names = drawing.lanes.iter().map(|lane| lane.name.chars().count());
    let names = names.max().unwrap_or(0).min(NAME_MAX);
    // What is beside the row's name: " frames ".
    let room = width.saturating_sub(names + 9).max(20);
    let mut text = format!("{}\n{}\n", drawing.title, drawing.subtitle);

    let (from, to) = drawing.whole;
    text.push_str(&format!("\nThe whole take, {}\n", time(to - from)));
    let axis = Axis { from, to, room };
    text.push_str(&axis.head(names));
    for lane in &drawing.lanes {
        let mut row = axis.row();
        // What matters most is drawn last, as it may be less than a letter long.
        for (number, span) in lane.spans.iter().enumerate() {
            let letter = match span.kind {
                Kind::Round if number % 2 == 1 => '-',
                Kind::Suspend | Kind::Pages | Kind::State | Kind::Resume => '#',
                kind => letter(kind),
            };
            axis.paint(&mut row, span, letter);
        }
        let cut = |kind| matches!(kind, Kind::Suspend | Kind::Pages);
        for span in lane.spans.iter().filter(|span| cut(span.kind)) {
            axis.paint(&mut row, span, '#');
        }
        text.push_str(&line(&lane.name, names, "", row));
    }

    let (from, to) = drawing.cut;
    text.push_str(&format!("\nThe cut, {}\n", time(to - from)));
    let axis = Axis { from, to, room };
    text.push_str(&axis.head(names));
    for lane in &drawing.lanes {
        let mut row = axis.row();
        axis.paint(&mut row, &lane.held, letter(Kind::Held));
        text.push_str(&line(&lane.name, names, "frames", row));
        let mut row = axis.row();
        for span in &lane.spans {
            axis.paint(&mut row, span, letter(span.kind));
        }
        text.push_str(&line("", names, "guest", row));
    }

    text.push_str("\nPages that were dirty, round by round\n");
    for lane in &drawing.lanes {
        text.push_str(&line(&lane.name, names, "", rounds(lane).chars().collect()));
    }
    text.push_str(&format!(
        "\n=- {}   ~ {}   # cut   h {}\ns {}   p {}   d {}   r {}   w {}\n",
        Kind::Round.words(),
        Kind::Hover.words(),
        Kind::Held.words(),
        Kind::Suspend.words(),
        Kind::Pages.words(),
        Kind::State.words(),
        Kind::Resume.words(),
        Kind::Finalise.words(),
    ));
    for lane in &drawing.lanes {
        text.push_str(&format!(
            "{}: cut at {}, down for {}, frames held for {}\n",
            lane.name,
            time(lane.cut_ns),
            ms(lane.downtime_ns),
            time(lane.held.length_ns())
        ));
    }
    text
}

/// The first rounds, what came then, and what was left.
fn rounds(lane: &Lane) -> String {
    let told = lane.rounds.iter().take(ROUNDS_TOLD);
    let mut words: Vec<String> = told
        .map(|round| match round.count {
            1 => round.pages.to_string(),
            count => format!("{}x{count}", round.pages),
        })
        .collect();
    if let [_, .., last] = lane.rounds.get(ROUNDS_TOLD..).unwrap_or_default() {
        words.push(format!("... {}", last.pages));
    }
    format!("{}; {} at the cut", words.join(" "), lane.final_pages)
}

fn line(name: &str, names: usize, what: &str, row: Vec<char>) -> String {
    let name: String = name.chars().take(names).collect();
    let row: String = row.into_iter().collect();
    format!("{name:<names$} {what:<7} {}", row.trim_end())
        .trim_end()
        .to_owned()
        + "\n"
}

struct Axis {
    from: f64,
    to: f64,
    room: usize,
}

impl Axis {
    fn row(&self) -> Vec<char> {
        vec![' '; self.room]
    }

    fn column(&self, at: f64) -> usize {
        let part = (at - self.from) / (self.to - self.from);
        // What is outside is at the edge; a float that is none, too.
        ((part * self.room as f64) as usize).min(self.room.saturating_sub(1))
    }

    /// At least one letter, whatever is there already.
    fn paint(&self, row: &mut [char], span: &Span, letter: char) {
        if span.to_ns < self.from || span.from_ns > self.to {
            return;
        }
        let (first, last) = (self.column(span.from_ns), self.column(span.to_ns));
        // Up to the next one's begin, so that it isn't painted over.
        let end = if last > first { last } else { first + 1 };
        if let Some(cells) = row.get_mut(first..end.min(self.room)) {
            cells.fill(letter);
        }
    }

    /// Times, and below them where they are.
    fn head(&self, names: usize) -> String {
        let (mut words, mut marks) = (self.row(), self.row());
        let mut free = 0;
        for at in ticks(self.from, self.to, (self.room / 16).max(2)) {
            let column = self.column(at);
            let word: Vec<char> = time(at).chars().collect();
            if column < free || column + word.len() > self.room {
                continue;
            }
            free = column + word.len() + 2;
            for (cell, letter) in words.iter_mut().skip(column).zip(word) {
                *cell = letter;
            }
            if let Some(cell) = marks.get_mut(column) {
                *cell = if at == 0.0 { '0' } else { '|' };
            }
        }
        line("", names, "", words) + &line("", names, "", marks)
    }
}
