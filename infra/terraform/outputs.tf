output "role_arn" {
  description = "For the annotation of the service accounts ray and ray-head."
  value       = aws_iam_role.pipeline.arn
}

output "kms_key_arn" {
  description = "For AWS_SSE_KMS_KEY_ID, where the buckets' default is not enough."
  value       = aws_kms_key.data.arn
}

output "queue_url" {
  description = "Holds one message for each new object in the raw bucket: what `watch` takes as its parameter `notification`."
  value       = aws_sqs_queue.drops.url
}
