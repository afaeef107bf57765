use crate::evaluation::Evaluation;

pub(super) fn html(_evaluation: &Evaluation) -> String {
    String::new()
}
