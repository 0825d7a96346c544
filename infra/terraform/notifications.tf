resource "aws_s3_bucket_notification" "raw" {
  bucket      = aws_s3_bucket.data[local.raw].id
  eventbridge = true
}

resource "aws_cloudwatch_event_rule" "drops" {
  name        = "${var.name}-drops"
  description = "A shard was written"
  event_pattern = jsonencode({
    source      = ["aws.s3"]
    detail-type = ["Object Created"]
    detail = {
      bucket = { name = [local.raw] }
      object = { key = [{ suffix = ".parquet" }] }
    }
  })
}

resource "aws_cloudwatch_event_target" "drops" {
  rule = aws_cloudwatch_event_rule.drops.name
  arn  = aws_sqs_queue.drops.arn
}

resource "aws_sqs_queue" "drops" {
  name                       = "${var.name}-drops"
  kms_master_key_id          = aws_kms_key.data.arn
  message_retention_seconds  = 345600
  visibility_timeout_seconds = 300
  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.failed.arn
    maxReceiveCount     = 5
  })
}

resource "aws_sqs_queue" "failed" {
  name                      = "${var.name}-drops-failed"
  kms_master_key_id         = aws_kms_key.data.arn
  message_retention_seconds = 1209600
}

resource "aws_sqs_queue_policy" "drops" {
  queue_url = aws_sqs_queue.drops.url
  policy    = data.aws_iam_policy_document.queue.json
}

data "aws_iam_policy_document" "queue" {
  statement {
    sid       = "OnlyTheRuleSends"
    actions   = ["sqs:SendMessage"]
    resources = [aws_sqs_queue.drops.arn]
    principals {
      type        = "Service"
      identifiers = ["events.amazonaws.com"]
    }
    condition {
      test     = "ArnEquals"
      variable = "aws:SourceArn"
      values   = [aws_cloudwatch_event_rule.drops.arn]
    }
  }
}
