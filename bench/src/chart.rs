//! Bar charts as SVG: panels one under the other, a bar a row with its label and value, an axis with a unit, the bound as a dashed line.

use std::fmt::Write;

const WIDTH: f64 = 860.0;
const LABELS: f64 = 250.0;
const VALUES: f64 = 90.0;
const BAR: f64 = 18.0;
const ROW: f64 = 25.0;
const TOP: f64 = 46.0;
const PANEL_HEAD: f64 = 30.0;
const PANEL_FOOT: f64 = 44.0;
/// Okabe and Ito's colours, told apart also by those who see red and green alike.
const OURS: &str = "#0072b2";
const THEIRS: &str = "#999999";
const BOUND: &str = "#d55e00";
/// Keeps a text readable over a line.
const HALO: &str = r#"stroke="white" stroke-width="3" paint-order="stroke""#;

#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) value: f64,
    pub(crate) ours: bool,
}

#[derive(Debug)]
pub(crate) struct Panel {
    pub(crate) title: String,
    /// Text of the axis, with the unit.
    pub(crate) axis: String,
    pub(crate) bars: Vec<Bar>,
    /// A value that must be reached, or not passed.
    pub(crate) bound: Option<f64>,
}

#[derive(Debug)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) panels: Vec<Panel>,
}

impl Chart {
    /// The whole file.
    pub(crate) fn svg(&self) -> String {
        let height = TOP + self.panels.iter().map(Panel::height).sum::<f64>();
        let mut svg = String::new();
        let mut line = |text: String| {
            svg.push_str(&text);
            svg.push('\n');
        };
        line(format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">"#
        ));
        line(format!(r#"<rect width="{WIDTH}" height="{height}" fill="white"/>"#));
        line(format!(r#"<text x="16" y="26" font-size="16" font-weight="bold">{}</text>"#, escape(&self.title)));
        let mut top = TOP;
        for panel in &self.panels {
            line(panel.svg(top));
            top += panel.height();
        }
        line("</svg>".to_owned());
        svg
    }
}

impl Panel {
    fn height(&self) -> f64 {
        PANEL_HEAD + ROW * self.bars.len() as f64 + PANEL_FOOT
    }

    fn svg(&self, top: f64) -> String {
        let mut svg = String::new();
        let largest = self.bars.iter().map(|b| b.value).chain(self.bound).fold(0.0, f64::max);
        let step = tick_step(largest);
        let end = (largest / step).ceil().max(1.0) * step;
        let scale = (WIDTH - LABELS - VALUES) / end;
        let bars_top = top + PANEL_HEAD;
        let bars_end = bars_top + ROW * self.bars.len() as f64;
        // Writing to a String cannot fail.
        let _ = writeln!(svg, r#"<text x="16" y="{:.1}" font-weight="bold">{}</text>"#, top + 18.0, escape(&self.title));
        let mut tick = 0.0;
        while tick <= end * 1.000_001 {
            let x = LABELS + tick * scale;
            let _ = writeln!(svg, r##"<line x1="{x:.1}" y1="{bars_top:.1}" x2="{x:.1}" y2="{bars_end:.1}" stroke="#dddddd"/>"##);
            let _ = writeln!(
                svg,
                r#"<text x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                bars_end + 15.0,
                tick_number(tick, step)
            );
            tick += step;
        }
        let axis_x = LABELS + end * scale / 2.0;
        let axis = escape(&self.axis);
        let _ = writeln!(
            svg,
            r##"<text x="{axis_x:.1}" y="{:.1}" text-anchor="middle" fill="#444444">{axis}</text>"##,
            bars_end + 31.0
        );
        let text_y = |i: usize| bars_top + ROW * i as f64 + (ROW + BAR) / 2.0 - 5.0;
        for (i, bar) in self.bars.iter().enumerate() {
            let y = bars_top + ROW * i as f64 + (ROW - BAR) / 2.0;
            let (width, colour) = ((bar.value * scale).max(0.0), if bar.ours { OURS } else { THEIRS });
            let text_y = text_y(i);
            let label = escape(&bar.label);
            let _ = writeln!(svg, r#"<text x="{:.1}" y="{text_y:.1}" text-anchor="end">{label}</text>"#, LABELS - 8.0);
            let _ = writeln!(svg, r#"<rect x="{LABELS}" y="{y:.1}" width="{width:.1}" height="{BAR}" fill="{colour}"/>"#);
        }
        if let Some(bound) = self.bound {
            let x = LABELS + bound * scale;
            let _ = writeln!(
                svg,
                r#"<line x1="{x:.1}" y1="{bars_top:.1}" x2="{x:.1}" y2="{bars_end:.1}" stroke="{BOUND}" stroke-width="2" stroke-dasharray="6 3"/>"#
            );
            let _ =
                writeln!(svg, r#"<text x="{x:.1}" y="{:.1}" fill="{BOUND}" text-anchor="middle">bound</text>"#, bars_top - 3.0);
        }
        // Last, over the bound's line.
        for (i, bar) in self.bars.iter().enumerate() {
            let x = LABELS + (bar.value * scale).max(0.0) + 6.0;
            let _ = writeln!(svg, r#"<text x="{x:.1}" y="{:.1}" {HALO}>{}</text>"#, text_y(i), number(bar.value));
        }
        svg
    }
}

/// A round step (1, 2 or 5 times a power of ten) that gives four to ten ticks.
fn tick_step(largest: f64) -> f64 {
    if largest <= 0.0 || !largest.is_finite() {
        return 1.0;
    }
    let power = 10_f64.powf((largest / 5.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| largest / s <= 7.0).unwrap_or(10.0 * power)
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => crate::report::whole(value),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// All ticks of an axis alike, with as many decimals as their step needs.
fn tick_number(tick: f64, step: f64) -> String {
    if step >= 1.0 { crate::report::whole(tick) } else { format!("{tick:.*}", (-step.log10().floor()).clamp(0.0, 9.0) as usize) }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_few_and_round() {
        for largest in [0.0, 0.003, 0.7, 1.0, 3.0, 9.9, 52_000.0, 1e9, f64::NAN] {
            let ticks = largest / tick_step(largest);
            assert!(largest.is_nan() || largest == 0.0 || (2.0..=7.0).contains(&ticks), "{largest}: {ticks}");
        }
        assert_eq!(tick_step(52_000.0), 10_000.0);
        assert_eq!(tick_number(0.15, 0.05), "0.15");
        assert_eq!(tick_number(1500.0, 500.0), "1,500");
    }

    #[test]
    fn text_is_escaped_and_a_chart_of_nothing_is_one() {
        let panel = Panel { title: "a < b & c".into(), axis: "x".into(), bars: vec![], bound: None };
        let svg = Chart { title: String::new(), panels: vec![panel] }.svg();
        assert!(svg.contains("a &lt; b &amp; c"));
        assert!(svg.ends_with("</svg>\n"));
    }
}
