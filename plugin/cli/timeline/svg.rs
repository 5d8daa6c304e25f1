//! The timeline for a browser: one file that needs nothing else, light or dark
//! as its reader likes it.

use super::super::units::ms;
use super::{ticks, time, Drawing, Kind, Lane, Plotted, Span};

/// Sizes in SVG's units, which are pixels unless somebody zooms.
const WIDTH: f64 = 1080.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 20.0;
const LANE: f64 = 34.0;
const BAR: f64 = 18.0;
const HELD: f64 = 6.0;
const PLOT: f64 = 64.0;
const HEAD: f64 = 46.0;

const STYLE: &str = "\
:root{color-scheme:light dark;--ground:#fff;--ink:#1d2430;--dim:#5b6675;--grid:#e3e7ec;\
--round:#4f7fc4;--hover:#b4cdec;--held:#8a94a3;--suspend:#e0a11b;--pages:#d2552f;--state:#9b3f8c;\
--resume:#4b9b52;--finalise:#b9c2cc;--zero:#c0392b}\
@media(prefers-color-scheme:dark){:root{--ground:#15191f;--ink:#e6eaf0;--dim:#98a4b3;--grid:#2b323c;\
--round:#5f92dc;--hover:#34557f;--held:#76808e;--suspend:#e0a11b;--pages:#e06a42;--state:#c06ab2;\
--resume:#5fb567;--finalise:#4a545f;--zero:#ff7b6b}}\
svg{background:var(--ground)}\
text{font:13px system-ui,'DejaVu Sans',sans-serif;fill:var(--ink)}\
text.dim{fill:var(--dim);font-size:11px}text.big{font-size:15px;font-weight:600}\
line.grid{stroke:var(--grid)}line.zero{stroke:var(--zero);stroke-dasharray:3 3}\
.round{fill:var(--round)}.hover{fill:var(--hover)}.held{fill:var(--held)}\
.suspend{fill:var(--suspend)}.pages{fill:var(--pages)}.state{fill:var(--state)}\
.resume{fill:var(--resume)}.finalise{fill:var(--finalise)}";

const PAGE_STYLE: &str = "\
body{margin:24px;background:var(--ground);color:var(--ink);\
font:15px/1.5 system-ui,'DejaVu Sans',sans-serif}\
h1{font-size:20px;margin:0}p{color:var(--dim);margin:2px 0 18px}\
svg{max-width:100%;height:auto}table{border-collapse:collapse;margin-top:18px}\
th,td{text-align:right;padding:3px 14px 3px 0;border-bottom:1px solid var(--grid)}\
th:first-child,td:first-child{text-align:left}th{font-weight:600}";

/// A page with the picture and the figures below it.
pub fn page(drawing: &Drawing) -> String {
    let mut rows = String::new();
    for lane in &drawing.lanes {
        let length = |kind: Kind| {
            let of_it = lane.spans.iter().filter(|span| span.kind == kind);
            time(of_it.map(Span::length_ns).sum())
        };
        let rounds: u64 = lane.rounds.iter().map(|round| u64::from(round.count)).sum();
        let cells = [
            escaped(&lane.name),
            time(lane.cut_ns),
            ms(lane.downtime_ns),
            length(Kind::Suspend),
            length(Kind::Pages),
            length(Kind::State),
            length(Kind::Resume),
            time(lane.held.length_ns()),
            rounds.to_string(),
            lane.final_pages.to_string(),
            length(Kind::Finalise),
        ];
        let cells: String = cells
            .iter()
            .map(|cell| format!("<td>{cell}</td>"))
            .collect();
        rows.push_str(&format!("<tr>{cells}</tr>\n"));
    }
    let head: String = [
        "Member",
        "Cut at",
        "Downtime",
        "Suspend",
        "Pages",
        "State",
        "Resume",
        "Frames held",
        "Rounds",
        "Last pages",
        "Writing out",
    ]
    .map(|title| format!("<th>{title}</th>"))
    .concat();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n\
         <style>{STYLE}{PAGE_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>{subtitle}</p>\n\
         {picture}\n<table>\n<tr>{head}</tr>\n{rows}</table>\n</body>\n</html>\n",
        title = escaped(&drawing.title),
        subtitle = escaped(&drawing.subtitle),
        picture = svg(drawing, ""),
    )
}

/// The picture alone.
pub fn picture(drawing: &Drawing) -> String {
    svg(drawing, &format!("<style>{STYLE}</style>\n"))
}

fn svg(drawing: &Drawing, style: &str) -> String {
    let mut body = String::new();
    let mut y = 8.0;
    legend(&mut body, &mut y);
    whole(drawing, &mut body, &mut y);
    cut(drawing, &mut body, &mut y);
    plots(drawing, &mut body, &mut y);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y:.0}\" \
         width=\"{WIDTH}\" height=\"{y:.0}\" role=\"img\" aria-label=\"{}\">\n{style}{body}</svg>",
        escaped(&drawing.title)
    )
}

/// A stretch of time across the picture.
struct Axis {
    from: f64,
    to: f64,
}

impl Axis {
    fn x(&self, at: f64) -> f64 {
        let part = (at - self.from) / (self.to - self.from);
        LEFT + part.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    /// A title, and lines for round times down to `height` below it.
    fn head(&self, body: &mut String, title: &str, y: &mut f64, height: f64) {
        text(body, 0.0, *y + 14.0, "big", title);
        *y += HEAD;
        let bottom = *y + height;
        for at in ticks(self.from, self.to, 9) {
            let x = self.x(at);
            let class = if at == 0.0 { "zero" } else { "grid" };
            body.push_str(&format!(
                "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{bottom:.1}\"/>\n",
                *y - 4.0
            ));
            let word = if at == 0.0 {
                "first cut".to_owned()
            } else {
                time(at)
            };
            body.push_str(&format!(
                "<text class=\"dim\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{word}</text>\n",
                *y - 9.0
            ));
        }
    }

    /// A bar that can be seen however short it is.
    fn bar(&self, body: &mut String, span: &Span, y: f64, height: f64, told: &str) {
        if span.to_ns < self.from || span.from_ns > self.to {
            return;
        }
        let (from, to) = (self.x(span.from_ns), self.x(span.to_ns));
        body.push_str(&format!(
            "<rect class=\"{}\" x=\"{from:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{height:.1}\">\
             <title>{}</title></rect>\n",
            span.kind.name(),
            (to - from).max(0.75),
            escaped(told)
        ));
    }
}

fn told(lane: &Lane, span: &Span) -> String {
    format!(
        "{}: {}, {} (from {})",
        lane.name,
        span.kind.words(),
        time(span.length_ns()),
        time(span.from_ns)
    )
}

fn legend(body: &mut String, y: &mut f64) {
    let mut x = 0.0;
    for kind in Kind::ALL {
        let words = kind.words();
        let width = 34.0 + 6.4 * words.len() as f64;
        if x + width > WIDTH {
            x = 0.0;
            *y += 20.0;
        }
        body.push_str(&format!(
            "<rect class=\"{}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"12\" height=\"12\"/>\n",
            kind.name(),
            *y
        ));
        text(body, x + 17.0, *y + 10.5, "dim", words);
        x += width;
    }
    *y += 34.0;
}

fn whole(drawing: &Drawing, body: &mut String, y: &mut f64) {
    let (from, to) = drawing.whole;
    let axis = Axis { from, to };
    let height = drawing.lanes.len() as f64 * LANE;
    let title = format!("The whole take: {}", time(to - from));
    axis.head(body, &title, y, height);
    for lane in &drawing.lanes {
        text(body, 0.0, *y + 18.0, "", &lane.name);
        for span in &lane.spans {
            let mut told = told(lane, span);
            let mut drawn = *span;
            if span.kind == Kind::Round {
                let round = lane
                    .rounds
                    .iter()
                    .find(|round| round.from_ns == span.from_ns);
                told = round.map_or(told, |round| round_told(lane, round));
                // A gap between two rounds, where there is room for one.
                drawn.to_ns -= ((to - from) / 1500.0).min(span.length_ns() / 3.0);
            }
            axis.bar(body, &drawn, *y + 4.0, BAR, &told);
        }
        axis.bar(
            body,
            &lane.held,
            *y + 4.0 + BAR,
            HELD,
            &told(lane, &lane.held),
        );
        *y += LANE;
    }
    *y += 26.0;
}

fn cut(drawing: &Drawing, body: &mut String, y: &mut f64) {
    let (from, to) = drawing.cut;
    let axis = Axis { from, to };
    let height = drawing.lanes.len() as f64 * (LANE + 8.0);
    axis.head(body, &format!("The cut: {}", time(to - from)), y, height);
    for lane in &drawing.lanes {
        text(body, 0.0, *y + 18.0, "", &lane.name);
        text(
            body,
            0.0,
            *y + 32.0,
            "dim",
            &format!("down for {}", ms(lane.downtime_ns)),
        );
        for span in &lane.spans {
            axis.bar(body, span, *y + 4.0, BAR, &told(lane, span));
        }
        axis.bar(
            body,
            &lane.held,
            *y + 4.0 + BAR,
            HELD,
            &told(lane, &lane.held),
        );
        // Where it stood still.
        let x = axis.x(lane.cut_ns);
        body.push_str(&format!(
            "<line class=\"zero\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\n",
            *y,
            *y + BAR + HELD + 8.0
        ));
        *y += LANE + 8.0;
    }
    *y += 26.0;
}

/// Dirty pages of each round, where the scale has to be logarithmic: the first
/// round has all of the memory, the last ones next to nothing.
fn plots(drawing: &Drawing, body: &mut String, y: &mut f64) {
    let (from, to) = drawing.whole;
    let axis = Axis { from, to };
    let height = drawing.lanes.len() as f64 * (PLOT + 18.0);
    axis.head(
        body,
        "Dirty pages, round by round (each line is ten times the one below it)",
        y,
        height,
    );
    let rounds = drawing.lanes.iter().flat_map(|lane| &lane.rounds);
    let most = rounds.map(|round| round.pages).max().unwrap_or(1).max(10) as f64;
    let top = most.log10().ceil();
    let level = |pages: u64| (pages.max(1) as f64).log10() / top;
    for lane in &drawing.lanes {
        let bottom = *y + PLOT;
        text(body, 0.0, *y + 18.0, "", &lane.name);
        let left = format!("{} pages at the cut", lane.final_pages);
        text(body, 0.0, *y + 32.0, "dim", &left);
        for power in 0..=top as u32 {
            let at = bottom - f64::from(power) / top * PLOT;
            body.push_str(&format!(
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\n",
                WIDTH - RIGHT
            ));
            if power == 0 || f64::from(power) == top {
                let word = 10u64.saturating_pow(power).to_string();
                body.push_str(&format!(
                    "<text class=\"dim\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{word}</text>\n",
                    LEFT - 6.0,
                    at + 4.0
                ));
            }
        }
        for round in &lane.rounds {
            let (x, end) = (axis.x(round.from_ns), axis.x(round.to_ns));
            let height = level(round.pages) * PLOT;
            body.push_str(&format!(
                "<rect class=\"round\" x=\"{x:.2}\" y=\"{:.1}\" width=\"{:.2}\" height=\"{height:.1}\">\
                 <title>{}</title></rect>\n",
                bottom - height,
                (end - x - 0.5).max(1.0),
                escaped(&round_told(lane, round))
            ));
        }
        let x = axis.x(lane.cut_ns);
        let height = level(lane.final_pages) * PLOT;
        body.push_str(&format!(
            "<rect class=\"pages\" x=\"{x:.2}\" y=\"{:.1}\" width=\"2\" height=\"{height:.1}\">\
             <title>{}: {left}</title></rect>\n",
            bottom - height,
            escaped(&lane.name)
        ));
        *y += PLOT + 18.0;
    }
}

fn round_told(lane: &Lane, round: &Plotted) -> String {
    let what = match round.count {
        1 => format!("a round of {} pages", round.pages),
        count => format!("{count} rounds of about {} pages", round.pages),
    };
    format!(
        "{}: {what}, {}",
        lane.name,
        time(round.to_ns - round.from_ns)
    )
}

fn text(body: &mut String, x: f64, y: f64, class: &str, words: &str) {
    body.push_str(&format!(
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>\n",
        escaped(words)
    ));
}

/// Labels are an admin's own words, and names those of guests.
fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut all, letter| {
        match letter {
            '&' => all.push_str("&amp;"),
            '<' => all.push_str("&lt;"),
            '>' => all.push_str("&gt;"),
            '"' => all.push_str("&quot;"),
            letter if letter.is_control() => all.push(' '),
            letter => all.push(letter),
        }
        all
    })
}
